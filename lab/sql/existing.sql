-- The database of the workers that standpipe replaces, with all its indexes: what `standpipe bench --existing` starts from.
-- Made from tests/fixtures/existing-database.tsv and existing-indexes.tsv; a test says when they differ.

CREATE TABLE blocks (
    uri character varying(512) not null,
    blocker_did character varying(255) not null,
    blocked_did character varying(255) not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null,
    commit_time timestamp without time zone,
    commit_seq character varying(32),
    commit_rev character varying(64)
);

CREATE TABLE bookmarks (
    uri character varying(512) not null,
    user_did character varying(255) not null,
    post_uri character varying(512) not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE feed_generators (
    uri character varying(512) not null,
    cid character varying(255) not null,
    creator_did character varying(255) not null,
    did character varying(255) not null,
    display_name character varying(255) not null,
    description text,
    avatar_url text,
    like_count integer DEFAULT 0 not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE feed_items (
    uri character varying(512) not null,
    post_uri character varying(512) not null,
    originator_did character varying(255) not null,
    type character varying(32) not null,
    sort_at timestamp without time zone not null,
    cid character varying(255) not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE follows (
    uri character varying(512) not null,
    follower_did character varying(255) not null,
    following_did character varying(255) not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null,
    commit_time timestamp without time zone,
    commit_seq character varying(32),
    commit_rev character varying(64)
);

CREATE TABLE generic_records (
    uri character varying(512) not null,
    cid character varying(255) not null,
    author_did character varying(255) not null,
    record_type character varying(255) not null,
    record jsonb not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE labeler_services (
    uri character varying(512) not null,
    cid character varying(255) not null,
    creator_did character varying(255) not null,
    policies jsonb not null,
    like_count integer DEFAULT 0 not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE labels (
    uri character varying(512) not null,
    src character varying(255) not null,
    subject character varying(512) not null,
    val character varying(128) not null,
    neg boolean DEFAULT false not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE likes (
    uri character varying(512) not null,
    user_did character varying(255) not null,
    post_uri character varying(512) not null,
    subject_cid character varying(255),
    via jsonb,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null,
    commit_time timestamp without time zone,
    commit_seq character varying(32),
    commit_rev character varying(64)
);

CREATE TABLE list_blocks (
    uri character varying(512) not null,
    blocker_did character varying(255) not null,
    list_uri character varying(512) not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE list_items (
    uri character varying(512) not null,
    cid character varying(255) not null,
    list_uri character varying(512) not null,
    subject_did character varying(255) not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE lists (
    uri character varying(512) not null,
    cid character varying(255) not null,
    creator_did character varying(255) not null,
    name character varying(255) not null,
    purpose character varying(64) not null,
    description text,
    avatar_url text,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE notifications (
    id serial,
    uri character varying(512) not null,
    recipient_did character varying(255) not null,
    author_did character varying(255) not null,
    reason character varying(64) not null,
    reason_subject character varying(512),
    cid character varying(255),
    is_read boolean DEFAULT false not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE post_aggregations (
    post_uri character varying(512) not null,
    like_count integer DEFAULT 0 not null,
    repost_count integer DEFAULT 0 not null,
    reply_count integer DEFAULT 0 not null,
    bookmark_count integer DEFAULT 0 not null,
    quote_count integer DEFAULT 0 not null,
    created_at timestamp without time zone DEFAULT now() not null,
    updated_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE post_gates (
    post_uri character varying(512) not null,
    created_at timestamp without time zone DEFAULT now() not null,
    embedding_rules jsonb DEFAULT '{}'::jsonb not null
);

CREATE TABLE posts (
    uri character varying(512) not null,
    cid character varying(255) not null,
    author_did character varying(255) not null,
    text text not null,
    langs jsonb,
    parent_uri character varying(512),
    parent_cid character varying(255),
    root_uri character varying(512),
    root_cid character varying(255),
    embed jsonb,
    facets jsonb,
    violates_thread_gate boolean DEFAULT false not null,
    violates_embedding_rules boolean DEFAULT false not null,
    has_thread_gate boolean DEFAULT false not null,
    has_post_gate boolean DEFAULT false not null,
    tags jsonb DEFAULT '[]'::jsonb not null,
    search_vector tsvector,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null,
    commit_time timestamp without time zone,
    commit_seq character varying(32),
    commit_rev character varying(64)
);

CREATE TABLE quotes (
    uri character varying(512) not null,
    cid character varying(255) not null,
    post_uri character varying(512) not null,
    quoted_uri character varying(512) not null,
    quoted_cid character varying(255),
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE reposts (
    uri character varying(512) not null,
    user_did character varying(255) not null,
    post_uri character varying(512) not null,
    subject_cid character varying(255),
    via jsonb,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null,
    commit_time timestamp without time zone,
    commit_seq character varying(32),
    commit_rev character varying(64)
);

CREATE TABLE starter_packs (
    uri character varying(512) not null,
    cid character varying(255) not null,
    creator_did character varying(255) not null,
    name character varying(255) not null,
    description text,
    list_uri character varying(512),
    feeds jsonb DEFAULT '[]'::jsonb not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE thread_gates (
    post_uri character varying(512) not null,
    owner_did character varying(255) not null,
    allow_mentions boolean DEFAULT true not null,
    allow_following boolean DEFAULT true not null,
    allow_list_members boolean DEFAULT false not null,
    allow_list_uris jsonb DEFAULT '[]'::jsonb not null,
    created_at timestamp without time zone DEFAULT now() not null,
    updated_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE user_settings (
    user_did character varying(255) not null,
    blocked_keywords jsonb DEFAULT '[]'::jsonb not null,
    muted_users jsonb DEFAULT '[]'::jsonb not null,
    custom_lists jsonb DEFAULT '[]'::jsonb not null,
    feed_preferences jsonb DEFAULT '{}'::jsonb not null,
    data_collection_forbidden boolean DEFAULT false not null,
    last_backfill_at timestamp without time zone,
    last_liked_posts_backfill timestamp without time zone,
    last_follows_backfill timestamp without time zone,
    last_feeds_backfill timestamp without time zone,
    last_notifications_backfill timestamp without time zone,
    created_at timestamp without time zone DEFAULT now() not null,
    updated_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE users (
    did character varying(255) not null,
    handle character varying(255) not null,
    display_name character varying(255),
    avatar_url text,
    banner_url text,
    description text,
    profile_record jsonb,
    pinned_post jsonb,
    search_vector tsvector,
    created_at timestamp without time zone DEFAULT now() not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE TABLE verifications (
    uri character varying(512) not null,
    cid character varying(255) not null,
    subject_did character varying(255) not null,
    handle character varying(255) not null,
    verified_at timestamp without time zone not null,
    created_at timestamp without time zone not null,
    indexed_at timestamp without time zone DEFAULT now() not null
);

CREATE UNIQUE INDEX blocks_pkey ON blocks USING btree (uri);
ALTER TABLE blocks ADD PRIMARY KEY USING INDEX blocks_pkey;
CREATE INDEX idx_blocks_blocked ON blocks USING btree (blocked_did);
CREATE INDEX idx_blocks_blocker ON blocks USING btree (blocker_did);
CREATE UNIQUE INDEX unique_block_blocker_blocked ON blocks USING btree (blocker_did, blocked_did);
CREATE UNIQUE INDEX bookmarks_pkey ON bookmarks USING btree (uri);
ALTER TABLE bookmarks ADD PRIMARY KEY USING INDEX bookmarks_pkey;
CREATE INDEX idx_bookmarks_post_uri ON bookmarks USING btree (post_uri);
CREATE INDEX idx_bookmarks_user_did ON bookmarks USING btree (user_did);
CREATE UNIQUE INDEX unique_bookmark_user_post ON bookmarks USING btree (user_did, post_uri);
CREATE UNIQUE INDEX feed_generators_pkey ON feed_generators USING btree (uri);
ALTER TABLE feed_generators ADD PRIMARY KEY USING INDEX feed_generators_pkey;
CREATE INDEX idx_feed_generators_creator ON feed_generators USING btree (creator_did);
CREATE INDEX idx_feed_generators_did ON feed_generators USING btree (did);
CREATE INDEX idx_feed_generators_indexed_at ON feed_generators USING btree (indexed_at);
CREATE INDEX idx_feed_generators_like_count ON feed_generators USING btree (like_count);
CREATE UNIQUE INDEX feed_items_pkey ON feed_items USING btree (uri);
ALTER TABLE feed_items ADD PRIMARY KEY USING INDEX feed_items_pkey;
CREATE INDEX idx_feed_items_originator ON feed_items USING btree (originator_did);
CREATE INDEX idx_feed_items_originator_sort ON feed_items USING btree (originator_did, sort_at);
CREATE INDEX idx_feed_items_post ON feed_items USING btree (post_uri);
CREATE INDEX idx_feed_items_sort_at ON feed_items USING btree (sort_at);
CREATE INDEX idx_feed_items_type ON feed_items USING btree (type);
CREATE UNIQUE INDEX follows_pkey ON follows USING btree (uri);
ALTER TABLE follows ADD PRIMARY KEY USING INDEX follows_pkey;
CREATE INDEX idx_follows_follower ON follows USING btree (follower_did);
CREATE INDEX idx_follows_following ON follows USING btree (following_did);
CREATE UNIQUE INDEX unique_follow_follower_following ON follows USING btree (follower_did, following_did);
CREATE UNIQUE INDEX generic_records_pkey ON generic_records USING btree (uri);
ALTER TABLE generic_records ADD PRIMARY KEY USING INDEX generic_records_pkey;
CREATE INDEX idx_generic_records_author ON generic_records USING btree (author_did);
CREATE INDEX idx_generic_records_created_at ON generic_records USING btree (created_at);
CREATE INDEX idx_generic_records_type ON generic_records USING btree (record_type);
CREATE INDEX idx_labeler_services_creator ON labeler_services USING btree (creator_did);
CREATE INDEX idx_labeler_services_indexed_at ON labeler_services USING btree (indexed_at);
CREATE INDEX idx_labeler_services_like_count ON labeler_services USING btree (like_count);
CREATE UNIQUE INDEX labeler_services_pkey ON labeler_services USING btree (uri);
ALTER TABLE labeler_services ADD PRIMARY KEY USING INDEX labeler_services_pkey;
CREATE INDEX idx_labels_src ON labels USING btree (src);
CREATE INDEX idx_labels_subject ON labels USING btree (subject);
CREATE INDEX idx_labels_subject_val ON labels USING btree (subject, val);
CREATE INDEX idx_labels_val ON labels USING btree (val);
CREATE UNIQUE INDEX labels_pkey ON labels USING btree (uri);
ALTER TABLE labels ADD PRIMARY KEY USING INDEX labels_pkey;
CREATE INDEX idx_likes_post_uri ON likes USING btree (post_uri);
CREATE INDEX idx_likes_user_did ON likes USING btree (user_did);
CREATE UNIQUE INDEX likes_pkey ON likes USING btree (uri);
ALTER TABLE likes ADD PRIMARY KEY USING INDEX likes_pkey;
CREATE UNIQUE INDEX unique_like_user_post ON likes USING btree (user_did, post_uri);
CREATE INDEX idx_list_blocks_blocker ON list_blocks USING btree (blocker_did);
CREATE INDEX idx_list_blocks_list ON list_blocks USING btree (list_uri);
CREATE UNIQUE INDEX list_blocks_pkey ON list_blocks USING btree (uri);
ALTER TABLE list_blocks ADD PRIMARY KEY USING INDEX list_blocks_pkey;
CREATE UNIQUE INDEX unique_list_block ON list_blocks USING btree (blocker_did, list_uri);
CREATE INDEX idx_list_items_list ON list_items USING btree (list_uri);
CREATE INDEX idx_list_items_subject ON list_items USING btree (subject_did);
CREATE UNIQUE INDEX list_items_pkey ON list_items USING btree (uri);
ALTER TABLE list_items ADD PRIMARY KEY USING INDEX list_items_pkey;
CREATE UNIQUE INDEX unique_list_item ON list_items USING btree (list_uri, subject_did);
CREATE INDEX idx_lists_creator ON lists USING btree (creator_did);
CREATE INDEX idx_lists_indexed_at ON lists USING btree (indexed_at);
CREATE INDEX idx_lists_purpose ON lists USING btree (purpose);
CREATE UNIQUE INDEX lists_pkey ON lists USING btree (uri);
ALTER TABLE lists ADD PRIMARY KEY USING INDEX lists_pkey;
CREATE INDEX idx_notifications_created_at ON notifications USING btree (created_at);
CREATE INDEX idx_notifications_indexed_at ON notifications USING btree (indexed_at);
CREATE INDEX idx_notifications_recipient ON notifications USING btree (recipient_did);
CREATE INDEX idx_notifications_recipient_read ON notifications USING btree (recipient_did, is_read);
CREATE UNIQUE INDEX notifications_pkey ON notifications USING btree (id);
ALTER TABLE notifications ADD PRIMARY KEY USING INDEX notifications_pkey;
CREATE UNIQUE INDEX notifications_uri_unique ON notifications USING btree (uri);
CREATE INDEX idx_post_aggregations_bookmark_count ON post_aggregations USING btree (bookmark_count);
CREATE INDEX idx_post_aggregations_like_count ON post_aggregations USING btree (like_count);
CREATE INDEX idx_post_aggregations_quote_count ON post_aggregations USING btree (quote_count);
CREATE INDEX idx_post_aggregations_reply_count ON post_aggregations USING btree (reply_count);
CREATE INDEX idx_post_aggregations_repost_count ON post_aggregations USING btree (repost_count);
CREATE UNIQUE INDEX post_aggregations_pkey ON post_aggregations USING btree (post_uri);
ALTER TABLE post_aggregations ADD PRIMARY KEY USING INDEX post_aggregations_pkey;
CREATE INDEX idx_post_gates_created_at ON post_gates USING btree (created_at);
CREATE UNIQUE INDEX post_gates_pkey ON post_gates USING btree (post_uri);
ALTER TABLE post_gates ADD PRIMARY KEY USING INDEX post_gates_pkey;
CREATE INDEX idx_posts_author_did ON posts USING btree (author_did);
CREATE INDEX idx_posts_indexed_at ON posts USING btree (indexed_at);
CREATE INDEX idx_posts_parent_uri ON posts USING btree (parent_uri);
CREATE INDEX idx_posts_root_uri ON posts USING btree (root_uri);
CREATE INDEX idx_posts_search_vector ON posts USING gin (search_vector);
CREATE UNIQUE INDEX posts_pkey ON posts USING btree (uri);
ALTER TABLE posts ADD PRIMARY KEY USING INDEX posts_pkey;
CREATE INDEX idx_quotes_post ON quotes USING btree (post_uri);
CREATE INDEX idx_quotes_quoted ON quotes USING btree (quoted_uri);
CREATE UNIQUE INDEX quotes_pkey ON quotes USING btree (uri);
ALTER TABLE quotes ADD PRIMARY KEY USING INDEX quotes_pkey;
CREATE UNIQUE INDEX unique_quote_post_quoted ON quotes USING btree (post_uri, quoted_uri);
CREATE INDEX idx_reposts_post_uri ON reposts USING btree (post_uri);
CREATE INDEX idx_reposts_user_did ON reposts USING btree (user_did);
CREATE UNIQUE INDEX reposts_pkey ON reposts USING btree (uri);
ALTER TABLE reposts ADD PRIMARY KEY USING INDEX reposts_pkey;
CREATE UNIQUE INDEX unique_repost_user_post ON reposts USING btree (user_did, post_uri);
CREATE INDEX idx_starter_packs_creator ON starter_packs USING btree (creator_did);
CREATE INDEX idx_starter_packs_indexed_at ON starter_packs USING btree (indexed_at);
CREATE INDEX idx_starter_packs_list ON starter_packs USING btree (list_uri);
CREATE UNIQUE INDEX starter_packs_pkey ON starter_packs USING btree (uri);
ALTER TABLE starter_packs ADD PRIMARY KEY USING INDEX starter_packs_pkey;
CREATE INDEX idx_thread_gates_owner ON thread_gates USING btree (owner_did);
CREATE UNIQUE INDEX thread_gates_pkey ON thread_gates USING btree (post_uri);
ALTER TABLE thread_gates ADD PRIMARY KEY USING INDEX thread_gates_pkey;
CREATE UNIQUE INDEX user_settings_pkey ON user_settings USING btree (user_did);
ALTER TABLE user_settings ADD PRIMARY KEY USING INDEX user_settings_pkey;
CREATE INDEX idx_users_created_at ON users USING btree (created_at);
CREATE INDEX idx_users_handle ON users USING btree (handle);
CREATE INDEX idx_users_search_vector ON users USING gin (search_vector);
CREATE UNIQUE INDEX users_pkey ON users USING btree (did);
ALTER TABLE users ADD PRIMARY KEY USING INDEX users_pkey;
CREATE INDEX idx_verifications_handle ON verifications USING btree (handle);
CREATE INDEX idx_verifications_subject ON verifications USING btree (subject_did);
CREATE UNIQUE INDEX unique_verification_subject ON verifications USING btree (subject_did);
CREATE UNIQUE INDEX verifications_pkey ON verifications USING btree (uri);
ALTER TABLE verifications ADD PRIMARY KEY USING INDEX verifications_pkey;
