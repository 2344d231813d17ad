"""What the frontend says of itself: its OpenAPI document, and the page that shows it. Made when somebody asks, and not before."""
