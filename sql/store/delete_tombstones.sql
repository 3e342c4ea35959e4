-- Rows that a delete of the same record is moving forward just now are left for the next time.
DELETE FROM standpipe.tombstones WHERE uri IN (
SELECT uri FROM standpipe.tombstones WHERE stream_ms < $1 LIMIT $2 FOR UPDATE SKIP LOCKED)
