-- The counter's row is locked.
UPDATE labeler_services s SET like_count = standpipe.like_count(s.uri) WHERE s.uri = ANY ($1::text[])
