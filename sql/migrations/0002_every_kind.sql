-- What decides which of two events is newer, for the kinds whose tables the first migration left as they were.
ALTER TABLE lists
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE list_items
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE list_blocks
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE feed_generators
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE starter_packs
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE labeler_services
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE labels
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE verifications
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE post_gates
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE thread_gates
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;

-- A deletion whose account has rows that are still to be removed.
ALTER TABLE standpipe.accounts ADD COLUMN IF NOT EXISTS purge_pending boolean NOT NULL DEFAULT false;
CREATE INDEX IF NOT EXISTS idx_accounts_purge_pending ON standpipe.accounts (did) WHERE purge_pending;

-- A thread gate's rules as the record has them: who may reply is a function of them, and the columns of the old
-- workers cannot tell a gate without rules from one that lets nobody in, and have no word for followers.
ALTER TABLE thread_gates
    ADD COLUMN IF NOT EXISTS allow jsonb,
    ADD COLUMN IF NOT EXISTS hidden_replies jsonb;

-- Asked of every repository that writes.
ALTER TABLE user_settings ADD COLUMN IF NOT EXISTS data_collection_forbidden boolean;
