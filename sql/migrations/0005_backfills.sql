-- How far each backfill has listed its accounts, which it puts into standpipe.repos.
CREATE TABLE IF NOT EXISTS standpipe.backfills (
    -- the value of BACKFILL
    what text PRIMARY KEY,
    -- where to continue; NULL at the beginning
    cursor text,
    listed bigint NOT NULL DEFAULT 0,
    -- when the end of the list was reached last
    done_at timestamptz,
    started_at timestamptz NOT NULL DEFAULT now()
);
