"""What people see: tables, figures and the HTML page."""
