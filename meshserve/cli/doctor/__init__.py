"""`meshserve doctor`: why peers do not see each other. Here facts are gathered and findings shown; observe/diagnosis judges."""
