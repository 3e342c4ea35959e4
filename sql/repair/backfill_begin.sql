-- How far a backfill ($1) is; begins it if need be.
INSERT INTO standpipe.backfills AS b (what) VALUES ($1) ON CONFLICT (what) DO UPDATE SET what = excluded.what
RETURNING b.cursor, b.done_at IS NOT NULL, extract(epoch FROM now() - b.done_at)::float8
