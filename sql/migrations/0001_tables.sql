-- The application's tables, as the workers that standpipe replaces write them, and standpipe's own.
--
-- On an empty database this creates everything. On a database that has the tables already, CREATE TABLE
-- IF NOT EXISTS leaves them alone and only the nullable columns at the end are added (a change of the catalogue,
-- no rewrite). Keys compare bytewise (COLLATE "C"): URIs and DIDs are ASCII, and comparing them with a
-- language's rules made every index probe several times dearer.
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
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    author_did varchar(255) COLLATE "C" NOT NULL,
    text text NOT NULL,
    langs jsonb,
    parent_uri varchar(512) COLLATE "C",
    parent_cid varchar(255),
    root_uri varchar(512) COLLATE "C",
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
    post_uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
    post_uri varchar(512) COLLATE "C" NOT NULL,
    originator_did varchar(255) COLLATE "C" NOT NULL,
    type varchar(32) NOT NULL,
    sort_at timestamp NOT NULL,
    cid varchar(255) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS likes (
    uri varchar(512) COLLATE "C" NOT NULL,
    user_did varchar(255) COLLATE "C" NOT NULL,
    post_uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
    user_did varchar(255) COLLATE "C" NOT NULL,
    post_uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    post_uri varchar(512) COLLATE "C" NOT NULL,
    quoted_uri varchar(512) COLLATE "C" NOT NULL,
    quoted_cid varchar(255),
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS bookmarks (
    uri varchar(512) COLLATE "C" NOT NULL,
    user_did varchar(255) COLLATE "C" NOT NULL,
    post_uri varchar(512) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS follows (
    uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    list_uri varchar(512) COLLATE "C" NOT NULL,
    subject_did varchar(255) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS list_blocks (
    uri varchar(512) COLLATE "C" NOT NULL,
    blocker_did varchar(255) COLLATE "C" NOT NULL,
    list_uri varchar(512) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS feed_generators (
    uri varchar(512) COLLATE "C" NOT NULL,
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
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) COLLATE "C" NOT NULL,
    name varchar(255) NOT NULL,
    description text,
    list_uri varchar(512) COLLATE "C",
    feeds jsonb NOT NULL DEFAULT '[]'::jsonb,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS labeler_services (
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) COLLATE "C" NOT NULL,
    policies jsonb NOT NULL,
    like_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS labels (
    uri varchar(512) COLLATE "C" NOT NULL,
    src varchar(255) COLLATE "C" NOT NULL,
    subject varchar(512) COLLATE "C" NOT NULL,
    val varchar(128) NOT NULL,
    neg boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS verifications (
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    subject_did varchar(255) COLLATE "C" NOT NULL,
    handle varchar(255) COLLATE "C" NOT NULL,
    verified_at timestamp NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

CREATE TABLE IF NOT EXISTS post_gates (
    post_uri varchar(512) COLLATE "C" NOT NULL,
    created_at timestamp NOT NULL DEFAULT now(),
    embedding_rules jsonb NOT NULL DEFAULT '{}'::jsonb,
    PRIMARY KEY (post_uri)
);

CREATE TABLE IF NOT EXISTS thread_gates (
    post_uri varchar(512) COLLATE "C" NOT NULL,
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
    id serial,
    uri varchar(512) COLLATE "C" NOT NULL,
    recipient_did varchar(255) COLLATE "C" NOT NULL,
    author_did varchar(255) COLLATE "C" NOT NULL,
    reason varchar(64) NOT NULL,
    reason_subject varchar(512),
    cid varchar(255),
    is_read boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (id),
    CONSTRAINT notifications_uri_unique UNIQUE (uri)
);

CREATE TABLE IF NOT EXISTS generic_records (
    uri varchar(512) COLLATE "C" NOT NULL,
    cid varchar(255) NOT NULL,
    author_did varchar(255) COLLATE "C" NOT NULL,
    record_type varchar(255) NOT NULL,
    record jsonb NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    PRIMARY KEY (uri)
);

-- Indexes only on tables that this migration created: a database that was there before keeps its own.
-- (standpipe.tables_before is filled by the migration runner before this file runs.)
DO $$
DECLARE
    wanted CONSTANT text[][] := ARRAY[
        ARRAY['users', 'idx_users_handle', '(handle)'],
        ARRAY['posts', 'idx_posts_author_did', '(author_did, created_at)'],
        ARRAY['posts', 'idx_posts_parent_uri', '(parent_uri) WHERE parent_uri IS NOT NULL'],
        ARRAY['posts', 'idx_posts_root_uri', '(root_uri) WHERE root_uri IS NOT NULL'],
        ARRAY['feed_items', 'idx_feed_items_originator_sort', '(originator_did, sort_at)'],
        ARRAY['feed_items', 'idx_feed_items_sort_at', '(sort_at)'],
        ARRAY['likes', 'idx_likes_post_user', '(post_uri, user_did)'],
        ARRAY['likes', 'idx_likes_user_did', '(user_did)'],
        ARRAY['reposts', 'idx_reposts_post_user', '(post_uri, user_did)'],
        ARRAY['reposts', 'idx_reposts_user_did', '(user_did)'],
        ARRAY['quotes', 'idx_quotes_quoted', '(quoted_uri)'],
        ARRAY['bookmarks', 'idx_bookmarks_user_post', '(user_did, post_uri)'],
        ARRAY['bookmarks', 'idx_bookmarks_post_uri', '(post_uri)'],
        ARRAY['follows', 'idx_follows_follower_following', '(follower_did, following_did)'],
        ARRAY['follows', 'idx_follows_following', '(following_did)'],
        ARRAY['blocks', 'idx_blocks_blocker_blocked', '(blocker_did, blocked_did)'],
        ARRAY['blocks', 'idx_blocks_blocked', '(blocked_did)'],
        ARRAY['lists', 'idx_lists_creator', '(creator_did)'],
        ARRAY['list_items', 'idx_list_items_list_subject', '(list_uri, subject_did)'],
        ARRAY['list_items', 'idx_list_items_subject', '(subject_did)'],
        ARRAY['list_blocks', 'idx_list_blocks_blocker', '(blocker_did)'],
        ARRAY['list_blocks', 'idx_list_blocks_list', '(list_uri)'],
        ARRAY['feed_generators', 'idx_feed_generators_creator', '(creator_did)'],
        ARRAY['starter_packs', 'idx_starter_packs_creator', '(creator_did)'],
        ARRAY['labeler_services', 'idx_labeler_services_creator', '(creator_did)'],
        ARRAY['labels', 'idx_labels_subject_val', '(subject, val)'],
        ARRAY['verifications', 'idx_verifications_subject', '(subject_did)'],
        ARRAY['thread_gates', 'idx_thread_gates_owner', '(owner_did)'],
        ARRAY['notifications', 'idx_notifications_recipient', '(recipient_did, created_at)'],
        ARRAY['generic_records', 'idx_generic_records_author', '(author_did)'],
        ARRAY['generic_records', 'idx_generic_records_type', '(record_type)']
    ];
    entry text[];
BEGIN
    FOREACH entry SLICE 1 IN ARRAY wanted LOOP
        IF NOT EXISTS (SELECT FROM standpipe.tables_before b WHERE b.name = entry[1]) THEN
            EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON %I %s', entry[2], entry[1], entry[3]);
        END IF;
    END LOOP;
END $$;

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


-- A deleted record, so that a create of it that comes late stays dead.
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

-- What an operation came to: whether it changed something, and what it counts.
CREATE TYPE standpipe.effect AS (
    applied boolean,
    deltas standpipe.delta[]
);
