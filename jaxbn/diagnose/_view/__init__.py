"""How a report is shown: what it says (`content`), as text, as HTML and as a picture."""
