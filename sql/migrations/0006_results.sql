-- What came of each task: a message that one of the operator's functions handles.
CREATE TABLE IF NOT EXISTS standpipe.results (
    type text NOT NULL,
    -- the message's own id, or the id of its entry
    id text NOT NULL,
    -- running, retrying (waiting for another attempt), done or failed
    state text NOT NULL,
    -- how often it was begun, and how often that failed
    attempts integer NOT NULL DEFAULT 0,
    failures integer NOT NULL DEFAULT 0,
    -- what the function returned
    result jsonb,
    -- why the last attempt failed
    error text,
    -- the process that works on it, or did
    by text,
    -- the delivery that it came with last: the id of an entry, or a dead letter that was tried again
    entry text NOT NULL DEFAULT '',
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    PRIMARY KEY (type, id)
);
CREATE INDEX IF NOT EXISTS results_started_at ON standpipe.results (started_at);
