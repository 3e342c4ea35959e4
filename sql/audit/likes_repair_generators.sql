-- The counter's row is locked.
UPDATE feed_generators g SET like_count = standpipe.like_count(g.uri) WHERE g.uri = ANY ($1::text[])
