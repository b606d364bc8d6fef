"""2-D images: resized, filtered, converted, looked into."""
