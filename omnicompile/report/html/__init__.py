"""A plan as one page of HTML that needs nothing beside itself: see `page.page_html`."""
