-- Repositories that are repaired, or were: found to differ from what arrived.
CREATE TABLE IF NOT EXISTS standpipe.repos (
    did text COLLATE "C" PRIMARY KEY,
    -- queued; synced: compared with the whole repository; gone: there is none to fetch; error: it was given up
    state text NOT NULL,
    -- what is queued first: 0 repairs, 1 those asked for by hand
    class smallint NOT NULL,
    reason text NOT NULL,
    -- the revision that revealed the difference: an older repository repairs nothing
    wanted_rev text COLLATE "C" NOT NULL DEFAULT '',
    -- of the last repository that was compared
    rev text COLLATE "C",
    host text,
    attempts integer NOT NULL DEFAULT 0,
    -- how often it was asked for: more by the end of a repair than at its beginning, and it is queued again
    requests bigint NOT NULL DEFAULT 1,
    retry_at timestamptz NOT NULL DEFAULT now(),
    -- its records; how many of them were missing or different, how many rows were to be deleted, how many were refused
    records bigint,
    healed bigint,
    deleted bigint,
    refused bigint,
    -- a tree that would delete a large share of the rows: believed when it is found again
    doubted text,
    message text,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS idx_repos_queued ON standpipe.repos (class, retry_at) WHERE state = 'queued';

-- The revision of the last whole repository that was compared with the account's rows: every older operation is dead.
ALTER TABLE standpipe.accounts ADD COLUMN IF NOT EXISTS complete_rev text COLLATE "C";
