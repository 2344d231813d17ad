"""The page's style: light, dark, and on paper. Colours of series are told apart by people who see few of them (Okabe and Ito, 2008)."""

STYLE = """
:root{--ink:#1c2126;--dim:#5d6771;--paper:#fff;--rule:#dfe3e7;--mark:#fff3d1;
--c0:#9aa4ad;--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#cc3d74;--c5:#7a5195;--c6:#b58900;--c7:#56b4e9;--c8:#6b6b6b}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--dim:#98a2ac;--paper:#14181c;--rule:#2c333a;--mark:#3a3216;
--c0:#6d7780;--c1:#56b4e9;--c2:#f08c4a;--c3:#2fc79a;--c4:#f07ab0;--c5:#b79be0;--c6:#e6c04a;--c7:#9ad4f5;--c8:#b5b5b5}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;padding:24px;max-width:1220px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:20px 0 6px}
code{font:13px/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
.meta{color:var(--dim);margin:0 0 16px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:10px 0}
th,td{padding:3px 12px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--dim);font-weight:600}
th:first-child,td:first-child{text-align:left;padding-left:0}
tr.marked td{background:var(--mark);font-weight:600}
.notes{border-left:3px solid var(--c6);padding:2px 0 2px 24px;margin:14px 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:20px;margin-top:20px}
figure{margin:0;break-inside:avoid}
figcaption{font-weight:600}figcaption b{margin-right:14px}
svg{width:100%;height:auto;max-width:820px;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
svg text.word{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:4px}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.line.again{stroke-dasharray:6 3}
.thick{fill:none;stroke:currentColor;stroke-width:5;stroke-linecap:round;opacity:.55}
.dot{fill:currentColor}
.ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.dashed{stroke:var(--dim);stroke-dasharray:4 3;fill:none}
.key{font-weight:400;font-size:13px;margin-right:14px;white-space:nowrap;color:var(--ink)!important}
.key::before{content:"";display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px;background:var(--key)}
.key.again::before{background:repeating-linear-gradient(90deg,var(--key) 0 3px,transparent 3px 5px)}
@media (max-width:600px){body{padding:14px}th,td{padding:3px 4px;font-size:12px}svg text{font-size:17px}}
.bar{display:flex;height:22px;border-radius:4px;overflow:hidden;max-width:820px}
.part{background:var(--key)}
.c0{color:var(--c0);--key:var(--c0)}.c1{color:var(--c1);--key:var(--c1)}.c2{color:var(--c2);--key:var(--c2)}
.c3{color:var(--c3);--key:var(--c3)}.c4{color:var(--c4);--key:var(--c4)}.c5{color:var(--c5);--key:var(--c5)}
.c6{color:var(--c6);--key:var(--c6)}.c7{color:var(--c7);--key:var(--c7)}.c8{color:var(--c8);--key:var(--c8)}
@media print{:root{--ink:#000;--dim:#444;--paper:#fff;--rule:#ccc;--mark:#f3f3f3;
--c0:#999;--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#cc3d74;--c5:#7a5195;--c6:#b58900;--c7:#56b4e9;--c8:#666}
body{padding:0;max-width:none;font-size:10pt}.plots{grid-template-columns:1fr 1fr;gap:12px}th,td{padding:2px 7px}
svg text{font-size:16px}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}@page{size:A4;margin:14mm}}
"""
