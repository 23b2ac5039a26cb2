"""Search for images by texts, by other images, or by sums and differences of both; a page and a JSON API."""
