-- The application's tables, as the workers that standpipe replaces write them, and standpipe's own.
--
-- On an empty database all of this is one transaction. On a database that has the tables already, every statement
-- is a transaction of its own that waits only a moment for its lock; what is there already is passed over, so that
-- it can be interrupted anywhere and restarted. So every statement must be one that the runner knows
-- (src/store/migrate/statement.rs) or one that can be repeated, and none may rewrite a table: columns come nullable
-- or with a constant default.
--
-- Keys compare bytewise (COLLATE "C"): URIs and DIDs are ASCII, and comparing them with a language's rules made every
-- index probe several times more expensive.
-- An index stands here only where reading needs it: keeping long text keys in order is most of what a write costs.

CREATE TABLE IF NOT EXISTS users (
    did varchar(255) COLLATE "C" NOT NULL,
    handle varchar(255) COLLATE "C" NOT NULL,
    display_name varchar(255),
    avatar_url text,
    banner_url text,
    description text,
    profile_record jsonb,
    pinned_post jsonb,
    search_vector tsvector,
    created_at timestamp NOT NULL DEFAULT now(),
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (did)
);

CREATE TABLE IF NOT EXISTS user_settings (
    user_did varchar(255) COLLATE "C" NOT NULL,
    blocked_keywords jsonb NOT NULL DEFAULT '[]'::jsonb,
    muted_users jsonb NOT NULL DEFAULT '[]'::jsonb,
    custom_lists jsonb NOT NULL DEFAULT '[]'::jsonb,
    feed_preferences jsonb NOT NULL DEFAULT '{}'::jsonb,
    data_collection_forbidden boolean NOT NULL DEFAULT false,
    last_backfill_at timestamp,
    last_liked_posts_backfill timestamp,
    last_follows_backfill timestamp,
    last_feeds_backfill timestamp,
    last_notifications_backfill timestamp,
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (user_did)
);

CREATE TABLE IF NOT EXISTS posts (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    author_did varchar(255) COLLATE "C" NOT NULL,
    text text NOT NULL,
    langs jsonb,
    parent_uri varchar(8192) COLLATE "C",
    parent_cid varchar(255),
    root_uri varchar(8192) COLLATE "C",
    root_cid varchar(255),
    embed jsonb,
    facets jsonb,
    violates_thread_gate boolean NOT NULL DEFAULT false,
    violates_embedding_rules boolean NOT NULL DEFAULT false,
    has_thread_gate boolean NOT NULL DEFAULT false,
    has_post_gate boolean NOT NULL DEFAULT false,
    tags jsonb NOT NULL DEFAULT '[]'::jsonb,
    search_vector tsvector,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64),
    PRIMARY KEY (uri)
);

-- Every like of a post updates its row here: no counter is indexed and pages keep room, so that the
-- update stays on its page (HOT) and touches no index.
CREATE TABLE IF NOT EXISTS post_aggregations (
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    like_count integer NOT NULL DEFAULT 0,
    repost_count integer NOT NULL DEFAULT 0,
    reply_count integer NOT NULL DEFAULT 0,
    bookmark_count integer NOT NULL DEFAULT 0,
    quote_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (post_uri)
) WITH (fillfactor = 70);

CREATE TABLE IF NOT EXISTS feed_items (
    uri varchar(8192) COLLATE "C" NOT NULL,
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    originator_did varchar(255) COLLATE "C" NOT NULL,
    type varchar(32) NOT NULL,
    sort_at timestamp NOT NULL,
    cid varchar(255) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS likes (
    uri varchar(8192) COLLATE "C" NOT NULL,
    user_did varchar(255) COLLATE "C" NOT NULL,
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    subject_cid varchar(255),
    via jsonb,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS reposts (
    uri varchar(8192) COLLATE "C" NOT NULL,
    user_did varchar(255) COLLATE "C" NOT NULL,
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    subject_cid varchar(255),
    via jsonb,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS quotes (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    quoted_uri varchar(8192) COLLATE "C" NOT NULL,
    quoted_cid varchar(255),
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS bookmarks (
    uri varchar(8192) COLLATE "C" NOT NULL,
    user_did varchar(255) COLLATE "C" NOT NULL,
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS follows (
    uri varchar(8192) COLLATE "C" NOT NULL,
    follower_did varchar(255) COLLATE "C" NOT NULL,
    following_did varchar(255) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS blocks (
    uri varchar(8192) COLLATE "C" NOT NULL,
    blocker_did varchar(255) COLLATE "C" NOT NULL,
    blocked_did varchar(255) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS lists (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) COLLATE "C" NOT NULL,
    name varchar(255) NOT NULL,
    purpose varchar(64) NOT NULL,
    description text,
    avatar_url text,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS list_items (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    list_uri varchar(8192) COLLATE "C" NOT NULL,
    subject_did varchar(255) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS list_blocks (
    uri varchar(8192) COLLATE "C" NOT NULL,
    blocker_did varchar(255) COLLATE "C" NOT NULL,
    list_uri varchar(8192) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS feed_generators (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) COLLATE "C" NOT NULL,
    did varchar(255) COLLATE "C" NOT NULL,
    display_name varchar(255) NOT NULL,
    description text,
    avatar_url text,
    like_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS starter_packs (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) COLLATE "C" NOT NULL,
    name varchar(255) NOT NULL,
    description text,
    list_uri varchar(8192) COLLATE "C",
    feeds jsonb NOT NULL DEFAULT '[]'::jsonb,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS labeler_services (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) COLLATE "C" NOT NULL,
    policies jsonb NOT NULL,
    like_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS labels (
    uri varchar(8192) COLLATE "C" NOT NULL,
    src varchar(255) COLLATE "C" NOT NULL,
    subject varchar(8192) COLLATE "C" NOT NULL,
    val varchar(128) NOT NULL,
    neg boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS verifications (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    subject_did varchar(255) COLLATE "C" NOT NULL,
    handle varchar(255) COLLATE "C" NOT NULL,
    verified_at timestamp NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS post_gates (
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL DEFAULT now(),
    embedding_rules jsonb NOT NULL DEFAULT '{}'::jsonb,
    PRIMARY KEY (post_uri)
);

CREATE TABLE IF NOT EXISTS thread_gates (
    post_uri varchar(8192) COLLATE "C" NOT NULL,
    owner_did varchar(255) COLLATE "C" NOT NULL,
    allow_mentions boolean NOT NULL DEFAULT true,
    allow_following boolean NOT NULL DEFAULT true,
    allow_list_members boolean NOT NULL DEFAULT false,
    allow_list_uris jsonb NOT NULL DEFAULT '[]'::jsonb,
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (post_uri)
);

CREATE TABLE IF NOT EXISTS notifications (
    id bigserial,
    uri varchar(8192) COLLATE "C" NOT NULL,
    recipient_did varchar(255) COLLATE "C" NOT NULL,
    author_did varchar(255) COLLATE "C" NOT NULL,
    reason varchar(64) NOT NULL,
    reason_subject varchar(8192),
    cid varchar(255),
    is_read boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (id),
    CONSTRAINT notifications_uri_unique UNIQUE (uri)
);

CREATE TABLE IF NOT EXISTS generic_records (
    uri varchar(8192) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    author_did varchar(255) COLLATE "C" NOT NULL,
    record_type varchar(255) NOT NULL,
    record jsonb NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

-- A table that was here before us keeps its own indexes: the runner passes these over there. (An index that every
-- database needs is written CREATE INDEX CONCURRENTLY.)
CREATE INDEX IF NOT EXISTS idx_users_handle ON users (handle);
CREATE INDEX IF NOT EXISTS idx_posts_author_did ON posts (author_did, created_at);
CREATE INDEX IF NOT EXISTS idx_posts_parent_uri ON posts (parent_uri) WHERE parent_uri IS NOT NULL;
CREATE INDEX IF NOT EXISTS idx_posts_root_uri ON posts (root_uri) WHERE root_uri IS NOT NULL;
CREATE INDEX IF NOT EXISTS idx_feed_items_originator_sort ON feed_items (originator_did, sort_at);
CREATE INDEX IF NOT EXISTS idx_feed_items_sort_at ON feed_items (sort_at);
CREATE INDEX IF NOT EXISTS idx_likes_post_user ON likes (post_uri, user_did);
CREATE INDEX IF NOT EXISTS idx_likes_user_did ON likes (user_did);
CREATE INDEX IF NOT EXISTS idx_reposts_post_user ON reposts (post_uri, user_did);
CREATE INDEX IF NOT EXISTS idx_reposts_user_did ON reposts (user_did);
CREATE INDEX IF NOT EXISTS idx_quotes_quoted ON quotes (quoted_uri);
CREATE INDEX IF NOT EXISTS idx_quotes_post ON quotes (post_uri);
CREATE INDEX IF NOT EXISTS idx_bookmarks_user_post ON bookmarks (user_did, post_uri);
CREATE INDEX IF NOT EXISTS idx_bookmarks_post_uri ON bookmarks (post_uri);
CREATE INDEX IF NOT EXISTS idx_follows_follower_following ON follows (follower_did, following_did);
CREATE INDEX IF NOT EXISTS idx_follows_following ON follows (following_did);
CREATE INDEX IF NOT EXISTS idx_blocks_blocker_blocked ON blocks (blocker_did, blocked_did);
CREATE INDEX IF NOT EXISTS idx_blocks_blocked ON blocks (blocked_did);
CREATE INDEX IF NOT EXISTS idx_lists_creator ON lists (creator_did);
CREATE INDEX IF NOT EXISTS idx_list_items_list_subject ON list_items (list_uri, subject_did);
CREATE INDEX IF NOT EXISTS idx_list_items_subject ON list_items (subject_did);
CREATE INDEX IF NOT EXISTS idx_list_blocks_blocker ON list_blocks (blocker_did);
CREATE INDEX IF NOT EXISTS idx_list_blocks_list ON list_blocks (list_uri);
CREATE INDEX IF NOT EXISTS idx_feed_generators_creator ON feed_generators (creator_did);
CREATE INDEX IF NOT EXISTS idx_starter_packs_creator ON starter_packs (creator_did);
CREATE INDEX IF NOT EXISTS idx_labeler_services_creator ON labeler_services (creator_did);
CREATE INDEX IF NOT EXISTS idx_labels_subject_val ON labels (subject, val);
CREATE INDEX IF NOT EXISTS idx_verifications_subject ON verifications (subject_did);
CREATE INDEX IF NOT EXISTS idx_thread_gates_owner ON thread_gates (owner_did);
CREATE INDEX IF NOT EXISTS idx_notifications_recipient ON notifications (recipient_did, created_at);
CREATE INDEX IF NOT EXISTS idx_generic_records_author ON generic_records (author_did);
CREATE INDEX IF NOT EXISTS idx_generic_records_type ON generic_records (record_type);

-- What a row was written with: the revision and sequence number of its commit and the id of its stream
-- entry. They decide which of two events about one record is newer (standpipe.newer).
ALTER TABLE posts
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE likes
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE reposts
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE follows
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE blocks
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE bookmarks
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;
ALTER TABLE generic_records
    ADD COLUMN IF NOT EXISTS commit_rev varchar(64),
    ADD COLUMN IF NOT EXISTS commit_seq varchar(32),
    ADD COLUMN IF NOT EXISTS stream_ms bigint,
    ADD COLUMN IF NOT EXISTS stream_seq bigint;

-- An account's status as the relay last gave it. NULL status: active, or nothing was said.
ALTER TABLE users
    ADD COLUMN IF NOT EXISTS account_active boolean NOT NULL DEFAULT true,
    ADD COLUMN IF NOT EXISTS account_status varchar(64);


-- A deleted record, so that a create of it that comes late stays dead. Under its DID: an account that was deleted.
CREATE TABLE IF NOT EXISTS standpipe.tombstones (
    uri text COLLATE "C" PRIMARY KEY,
    commit_rev text,
    commit_seq text,
    stream_ms bigint NOT NULL,
    stream_seq bigint NOT NULL
);

-- One row per account: the registers behind what `users` shows.
CREATE TABLE IF NOT EXISTS standpipe.accounts (
    did text COLLATE "C" PRIMARY KEY,
    -- the newest handle claimed for the account
    handle text COLLATE "C",
    handle_seq text,
    handle_ms bigint,
    handle_sq bigint,
    -- the newest write of app.bsky.actor.profile/self; a delete is a write of nothing
    profile_rev text,
    profile_seq text,
    profile_ms bigint,
    profile_sq bigint,
    -- the newest status: ordered by the relay's sequence number, else by the event's time
    status_seq text,
    status_time timestamp,
    status_ms bigint,
    status_sq bigint,
    -- the newest deletion; grows only
    deleted_seq text,
    deleted_time timestamp
);

-- The newest claimant of each handle.
CREATE TABLE IF NOT EXISTS standpipe.handles (
    handle text COLLATE "C" PRIMARY KEY,
    did text COLLATE "C" NOT NULL,
    seq text,
    ms bigint,
    sq bigint
);

-- One operation of one event, as the apply function takes it. What the general columns mean for a kind stands
-- at the head of that kind's file in sql/apply.
CREATE TYPE standpipe.op AS (
    repo text,
    uri text,
    cid text,
    rev text,
    seq text,
    ms bigint,
    sq bigint,
    subject text,
    subject_cid text,
    created_at timestamp,
    sort_at timestamp,
    body jsonb
);

-- A change of one post's counters.
CREATE TYPE standpipe.delta AS (
    post_uri text,
    likes integer,
    reposts integer,
    replies integer,
    quotes integer,
    bookmarks integer
);

-- The result of an operation: whether it changed something, and its changes of counters.
CREATE TYPE standpipe.effect AS (
    applied boolean,
    deltas standpipe.delta[]
);

-- The same for several operations, in order.
CREATE TYPE standpipe.effects AS (
    applied boolean[],
    deltas standpipe.delta[]
);

-- Operations of one kind for a function that takes several.
CREATE TYPE standpipe.set AS (
    kind text,
    ops standpipe.op[]
);

-- What standpipe.apply_each is given of one event: a record that is probably new, or all that standpipe.apply is given.
CREATE TYPE standpipe.call AS (
    kind text,
    record standpipe.op,
    locks text[],
    repos text[],
    handles text[],
    dids text[],
    sets standpipe.set[],
    ops standpipe.op[],
    kinds text[]
);
