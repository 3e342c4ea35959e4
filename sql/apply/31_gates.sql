-- app.bsky.feed.threadgate and app.bsky.feed.postgate: who may reply to a post, and who may quote it. subject: the
-- URI of the post, which is the one under the gate's own key in the gate's own repository; a record that names
-- another one has no effect and arrives as a delete. The tombstone is stored under the gate's own URI.
--
-- A post's four flags are a function of rows alone:
--   has_thread_gate, has_post_gate   the post's gate has a row
--   violates_thread_gate             by standpipe.breaks_thread_gate, of the root's gate and the root post
--   violates_embedding_rules         by standpipe.breaks_post_gate, of the quoted post's gate
-- so that whichever arrives last sets them: a post when it is written, a gate or root post for the posts that refer to
-- it.
--
-- The writers of a post hold the lock on its URI, shared ones on the URIs of its root and of what it quotes; those of
-- a gate hold the lock on the post's: of a gate and a post affected by it, one sees the other. A reply that is
-- moved to another root at the same time does not take its old root's lock: its row is locked, then checked
-- again before it is judged.

-- Whether a reply breaks its root's gate. A gate without rules lets everybody in, one with an empty list nobody but the
-- root's author. Rules about followers, follows and lists are not decided here but by the reading application: what
-- they might allow does not count as a breach. The accounts that the root mentions are known while it has a row. A
-- reply that the gate hides breaks it, whoever wrote it.
CREATE OR REPLACE FUNCTION standpipe.breaks_thread_gate(
    allow jsonb, hidden jsonb, root text, root_facets jsonb, author text, reply text
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(hidden ? reply, false)
        OR allow IS NOT NULL
        AND split_part(root, '/', 3) <> author
        AND NOT (allow @> '[{"$type": "app.bsky.feed.threadgate#followerRule"}]'
            OR allow @> '[{"$type": "app.bsky.feed.threadgate#followingRule"}]'
            OR allow @> '[{"$type": "app.bsky.feed.threadgate#listRule"}]'
            OR allow @> '[{"$type": "app.bsky.feed.threadgate#mentionRule"}]'
                AND coalesce(root_facets @> jsonb_build_array(jsonb_build_object('features', jsonb_build_array(
                    jsonb_build_object('$type', 'app.bsky.richtext.facet#mention', 'did', author)))), false))
$$;

-- Whether a post that quotes another breaks that post's gate: it is detached, or nobody else may quote that post.
CREATE OR REPLACE FUNCTION standpipe.breaks_post_gate(rules jsonb, quoted text, author text, quoting text)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(rules -> 'detachedEmbeddingUris' ? quoting, false)
        OR split_part(quoted, '/', 3) <> author
        AND coalesce(rules -> 'embeddingRules' @> '[{"$type": "app.bsky.feed.postgate#disableRule"}]', false)
$$;

-- Judges a post that is about to be written.
CREATE OR REPLACE FUNCTION standpipe.reply_breaks_gate(reply text, author text, root text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    g record;
BEGIN
    SELECT t.allow, t.hidden_replies INTO g FROM thread_gates t WHERE t.post_uri = root;
    RETURN FOUND AND standpipe.breaks_thread_gate(
        g.allow, g.hidden_replies, root, (SELECT p.facets FROM posts p WHERE p.uri = root), author, reply);
END $$;

CREATE OR REPLACE FUNCTION standpipe.quote_breaks_gate(quoting text, author text, quoted text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    rules jsonb;
BEGIN
    SELECT g.embedding_rules INTO rules FROM post_gates g WHERE g.post_uri = quoted;
    RETURN FOUND AND standpipe.breaks_post_gate(rules, quoted, author, quoting);
END $$;

-- Judges the replies to a root again. The rows belong to several repositories: only those that change are locked, in
-- key order.
CREATE OR REPLACE FUNCTION standpipe.judge_replies(root text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    g record;
    mentions jsonb;
    reply text;
BEGIN
    SELECT t.allow, t.hidden_replies INTO g FROM thread_gates t WHERE t.post_uri = root;
    SELECT p.facets INTO mentions FROM posts p WHERE p.uri = root;
    FOR reply IN
        SELECT p.uri FROM posts p
        WHERE p.root_uri = root AND p.violates_thread_gate <> standpipe.breaks_thread_gate(
            g.allow, g.hidden_replies, root, mentions, p.author_did, p.uri)
        ORDER BY p.uri COLLATE "C" FOR UPDATE
    LOOP
        UPDATE posts p SET violates_thread_gate = NOT p.violates_thread_gate
        WHERE p.uri = reply AND p.root_uri = root AND p.violates_thread_gate <> standpipe.breaks_thread_gate(
            g.allow, g.hidden_replies, root, mentions, p.author_did, p.uri);
    END LOOP;
END $$;

-- Judges the posts that quote a post again.
CREATE OR REPLACE FUNCTION standpipe.judge_quotes(quoted text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    rules jsonb;
    quoting text;
BEGIN
    SELECT g.embedding_rules INTO rules FROM post_gates g WHERE g.post_uri = quoted;
    FOR quoting IN
        SELECT p.uri FROM quotes q JOIN posts p ON p.uri = q.post_uri
        WHERE q.quoted_uri = quoted AND p.violates_embedding_rules <> standpipe.breaks_post_gate(
            rules, quoted, p.author_did, p.uri)
        ORDER BY p.uri COLLATE "C" FOR UPDATE OF p
    LOOP
        -- Now that nobody can change the post: does it still quote this one?
        UPDATE posts p SET violates_embedding_rules = NOT p.violates_embedding_rules
        WHERE p.uri = quoting AND EXISTS (
                SELECT FROM quotes q WHERE q.post_uri = p.uri AND q.quoted_uri = quoted)
            AND p.violates_embedding_rules <> standpipe.breaks_post_gate(rules, quoted, p.author_did, p.uri);
    END LOOP;
END $$;

-- Judges what a post's gates decide again, in a transaction of its own that sees what was committed while the gate, or
-- the post, was written.
CREATE OR REPLACE FUNCTION standpipe.judge_gate(post text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ignored text := standpipe.lock(ARRAY[post]);
BEGIN
    UPDATE posts p SET
        has_thread_gate = EXISTS (SELECT FROM thread_gates g WHERE g.post_uri = post),
        has_post_gate = EXISTS (SELECT FROM post_gates g WHERE g.post_uri = post)
    WHERE p.uri = post
      AND (p.has_thread_gate <> EXISTS (SELECT FROM thread_gates g WHERE g.post_uri = post)
        OR p.has_post_gate <> EXISTS (SELECT FROM post_gates g WHERE g.post_uri = post));
    ignored := standpipe.judge_replies(post);
    ignored := standpipe.judge_quotes(post);
END $$;

-- The same for a post, by the gates of its root and of the post that it quotes. A version that refers to others is
-- judged by whoever writes it.
CREATE OR REPLACE FUNCTION standpipe.judge_post(post text, root text, quoted text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ignored text := standpipe.lock(ARRAY(
        SELECT n.name FROM (
            SELECT post UNION SELECT '~' || root WHERE root <> post UNION SELECT '~' || quoted WHERE quoted <> post
        ) AS n (name) ORDER BY ltrim(n.name, '~') COLLATE "C"));
    author text := split_part(post, '/', 3);
    breaks_thread boolean := root IS NOT NULL AND standpipe.reply_breaks_gate(post, author, root);
    breaks_post boolean := quoted IS NOT NULL AND standpipe.quote_breaks_gate(post, author, quoted);
BEGIN
    UPDATE posts p SET violates_thread_gate = breaks_thread, violates_embedding_rules = breaks_post
    WHERE p.uri = post AND p.root_uri IS NOT DISTINCT FROM root
      AND (SELECT q.quoted_uri FROM quotes q WHERE q.post_uri = post) IS NOT DISTINCT FROM quoted
      AND (p.violates_thread_gate <> breaks_thread OR p.violates_embedding_rules <> breaks_post);
    ignored := standpipe.judge_gate(post);
END $$;

-- body: `allow` and `hidden_replies` where the record has them; `lists`, the URIs of its list rules.
CREATE OR REPLACE FUNCTION standpipe.put_thread_gate(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    allow jsonb := o.body -> 'allow';
    ignored text;
BEGIN
    IF standpipe.is_dead(o) THEN
        RETURN false;
    END IF;
    INSERT INTO thread_gates AS r (
        post_uri, owner_did, allow_mentions, allow_following, allow_list_members, allow_list_uris,
        allow, hidden_replies, created_at, updated_at, commit_rev, commit_seq, stream_ms, stream_seq)
    VALUES (
        o.subject, o.repo,
        allow IS NULL OR allow @> '[{"$type": "app.bsky.feed.threadgate#mentionRule"}]',
        allow IS NULL OR allow @> '[{"$type": "app.bsky.feed.threadgate#followingRule"}]',
        allow IS NULL OR allow @> '[{"$type": "app.bsky.feed.threadgate#listRule"}]',
        o.body -> 'lists', allow, o.body -> 'hidden_replies', o.created_at, now(), o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (post_uri) DO UPDATE SET
        owner_did = excluded.owner_did, allow_mentions = excluded.allow_mentions,
        allow_following = excluded.allow_following, allow_list_members = excluded.allow_list_members,
        allow_list_uris = excluded.allow_list_uris, allow = excluded.allow,
        hidden_replies = excluded.hidden_replies, created_at = excluded.created_at, updated_at = now(),
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE posts p SET has_thread_gate = true WHERE p.uri = o.subject AND NOT p.has_thread_gate;
    ignored := standpipe.judge_replies(o.subject);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_thread_gate(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.put_tombstone(o);
    PERFORM FROM thread_gates r WHERE r.post_uri = o.subject AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM standpipe.remove_thread_gate(o.subject);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION standpipe.remove_thread_gate(post text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM thread_gates r WHERE r.post_uri = post;
    UPDATE posts p SET has_thread_gate = false WHERE p.uri = post AND p.has_thread_gate;
    PERFORM standpipe.judge_replies(post);
END $$;

-- body: the column embedding_rules.
CREATE OR REPLACE FUNCTION standpipe.put_post_gate(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    IF standpipe.is_dead(o) THEN
        RETURN false;
    END IF;
    INSERT INTO post_gates AS r (post_uri, embedding_rules, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    VALUES (o.subject, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (post_uri) DO UPDATE SET
        embedding_rules = excluded.embedding_rules, created_at = excluded.created_at,
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE posts p SET has_post_gate = true WHERE p.uri = o.subject AND NOT p.has_post_gate;
    ignored := standpipe.judge_quotes(o.subject);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_post_gate(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.put_tombstone(o);
    PERFORM FROM post_gates r WHERE r.post_uri = o.subject AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM standpipe.remove_post_gate(o.subject);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION standpipe.remove_post_gate(post text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM post_gates r WHERE r.post_uri = post;
    UPDATE posts p SET has_post_gate = false WHERE p.uri = post AND p.has_post_gate;
    PERFORM standpipe.judge_quotes(post);
END $$;
