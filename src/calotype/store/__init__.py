"""What is kept on disk: records, manifests, images, and an index that can be made anew."""
