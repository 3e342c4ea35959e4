-- Counters are updated once per call, last, and in the order of their keys: two calls that updated the same posts in
-- the order of their operations would deadlock. There is no floor at zero: a negative counter is a defect that must be
-- visible.
CREATE OR REPLACE FUNCTION standpipe.count(deltas standpipe.delta[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    d standpipe.delta;
    ignored text;
BEGIN
    IF cardinality(deltas) = 1 THEN
        ignored := standpipe.count_one(deltas[1]);
    ELSE
        INSERT INTO post_aggregations AS a
            (post_uri, like_count, repost_count, reply_count, quote_count, bookmark_count)
        SELECT x.post_uri, sum(x.likes), sum(x.reposts), sum(x.replies), sum(x.quotes), sum(x.bookmarks)
        FROM unnest(deltas) x GROUP BY x.post_uri ORDER BY x.post_uri COLLATE "C"
        ON CONFLICT (post_uri) DO UPDATE SET
            like_count = a.like_count + excluded.like_count,
            repost_count = a.repost_count + excluded.repost_count,
            reply_count = a.reply_count + excluded.reply_count,
            quote_count = a.quote_count + excluded.quote_count,
            bookmark_count = a.bookmark_count + excluded.bookmark_count,
            updated_at = now()
        WHERE excluded.like_count <> 0 OR excluded.repost_count <> 0 OR excluded.reply_count <> 0
           OR excluded.quote_count <> 0 OR excluded.bookmark_count <> 0;
    END IF;
    FOREACH d IN ARRAY deltas LOOP
        IF d.likes <> 0 AND split_part(d.post_uri, '/', 4) IN ('app.bsky.feed.generator', 'app.bsky.labeler.service') THEN
            ignored := standpipe.copy_like_counts(ARRAY[d.post_uri]);
        END IF;
    END LOOP;
END $$;

-- Feed generators and labelers copy a counter, whose row is now locked until the end of the transaction: see
-- standpipe.change_late.
CREATE OR REPLACE FUNCTION standpipe.copy_like_counts(uris text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE feed_generators g SET like_count = standpipe.like_count(g.uri) WHERE g.uri = ANY (uris);
    UPDATE labeler_services s SET like_count = standpipe.like_count(s.uri) WHERE s.uri = ANY (uris);
END $$;

-- A call's only change, which is to a post.
CREATE OR REPLACE FUNCTION standpipe.count_one(d standpipe.delta) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO post_aggregations AS a
        (post_uri, like_count, repost_count, reply_count, quote_count, bookmark_count)
    VALUES (d.post_uri, d.likes, d.reposts, d.replies, d.quotes, d.bookmarks)
    ON CONFLICT (post_uri) DO UPDATE SET
        like_count = a.like_count + excluded.like_count,
        repost_count = a.repost_count + excluded.repost_count,
        reply_count = a.reply_count + excluded.reply_count,
        quote_count = a.quote_count + excluded.quote_count,
        bookmark_count = a.bookmark_count + excluded.bookmark_count,
        updated_at = now()
    WHERE excluded.like_count <> 0 OR excluded.repost_count <> 0 OR excluded.reply_count <> 0
       OR excluded.quote_count <> 0 OR excluded.bookmark_count <> 0;
END $$;

-- The operation with its number placed in the epoch in force at its entry, if it names none: version 0.1, which may
-- still be running alongside us, knows no epochs.
CREATE OR REPLACE FUNCTION standpipe.with_epoch(o standpipe.op) RETURNS standpipe.op LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF position('@' IN o.seq) = 0 THEN
        o.seq := standpipe.placed(o.seq, o.ms);
    END IF;
    RETURN o;
END $$;

-- Each account is in one of 64 partitions, by the hash that its lock has (src/store/partition.rs has the same one).
-- A transaction that writes for many accounts locks their partitions, and nothing else (standpipe.lock_partitions); one
-- that locks single accounts first takes a shared lock on their partitions.
CREATE OR REPLACE FUNCTION standpipe.partition(did text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT (hashtextextended(did, 0) & 63)::integer
$$;

-- Takes the shared locks on the partitions of these accounts, in order. 29296 is an arbitrary number: advisory locks
-- of two numbers are apart from those of one.
CREATE OR REPLACE FUNCTION standpipe.share_partitions(dids text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    IF cardinality(dids) = 1 THEN
        ignored := pg_advisory_xact_lock_shared(29296, (hashtextextended(dids[1], 0) & 63)::integer);
    ELSE
        PERFORM pg_advisory_xact_lock_shared(29296, p.number)
        FROM (SELECT DISTINCT standpipe.partition(d) AS number FROM unnest(dids) d ORDER BY 1) p;
    END IF;
END $$;

-- Begins a transaction that writes for many accounts: nobody else writes for any account of their partitions.
CREATE OR REPLACE FUNCTION standpipe.lock_partitions(dids text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ignored text := set_config('synchronous_commit', 'off', true);
BEGIN
    PERFORM pg_advisory_xact_lock(29296, p.number)
    FROM (SELECT DISTINCT standpipe.partition(d) AS number FROM unnest(dids) d ORDER BY 1) p;
END $$;

-- Begins a writing transaction: takes its locks, in order, and does not wait for the disk at its end.
CREATE OR REPLACE FUNCTION standpipe.lock(locks text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    name text;
    ignored text := set_config('synchronous_commit', 'off', true);
BEGIN
    -- The caller may already hold them.
    IF locks IS NULL THEN
        RETURN;
    END IF;
    FOREACH name IN ARRAY locks LOOP
        IF left(name, 1) = '~' THEN
            ignored := pg_advisory_xact_lock_shared(hashtextextended(substr(name, 2), 0));
        ELSE
            ignored := pg_advisory_xact_lock(hashtextextended(name, 0));
        END IF;
    END LOOP;
END $$;

-- Applies the operations of one event, or of several, in one transaction: all of them or none.
--
--   locks     the names to lock, sorted bytewise without the ~: the operations' repositories, and URIs of posts whose
--             gates may matter (31_gates.sql); with a leading ~ if a shared lock suffices
--   repos     the repositories
--   handles   the handles that #identity operations claim; empty otherwise
--   dids      accounts that must have a row in users, sorted
--   sets      from version 0.1, which may still be running alongside us: operations like those in ops
--   ops       operations, deletes first
--   kinds     the kind of each of these: '<kind>' or 'delete <kind>'
--
-- Empty lists are NULL.
--
-- Returns for each operation whether it changed something, in the order of the lists; if not, it was stale.
--
-- VOLATILE, and the locks come before anything is read: every later statement sees what the previous holders
-- committed. Inside the statement that writes they would come too late, because its snapshot is older.
-- synchronous_commit is off for this transaction only; the caller flushes once per batch before it acknowledges
-- anything. A SET clause on the function would be undone before the commit.
CREATE OR REPLACE FUNCTION standpipe.apply(
    locks text[], repos text[], handles text[], dids text[], sets standpipe.set[], ops standpipe.op[], kinds text[]
) RETURNS boolean[] LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    one standpipe.set;
    all_of standpipe.effects;
    ignored text;
BEGIN
    IF cardinality(handles) > 0 THEN
        handles := handles || (SELECT array_agg(a.handle) FROM standpipe.accounts a
                               WHERE a.did = ANY (repos) AND a.handle IS NOT NULL);
        -- In this order, an exclusive lock comes before a shared one with the same name.
        locks := ARRAY(SELECT n.name FROM (SELECT unnest(locks) UNION SELECT '@' || unnest(handles)) AS n (name)
                       ORDER BY ltrim(n.name, '~') COLLATE "C", n.name COLLATE "C");
    END IF;
    IF cardinality(repos) = 1 THEN
        -- What standpipe.share_partitions does, without a call.
        ignored := concat(pg_advisory_xact_lock_shared(29296, (hashtextextended(repos[1], 0) & 63)::integer),
                          standpipe.lock(locks));
    ELSE
        ignored := concat(standpipe.share_partitions(repos), standpipe.lock(locks));
    END IF;

    IF sets IS NOT NULL THEN
        DECLARE
            former_ops standpipe.op[] := '{}';
            former_kinds text[] := '{}';
        BEGIN
            FOREACH one IN ARRAY sets LOOP
                former_ops := former_ops || one.ops;
                former_kinds := former_kinds || array_fill(one.kind, ARRAY[cardinality(one.ops)]);
            END LOOP;
            ops := former_ops || ops;
            kinds := former_kinds || kinds;
        END;
    END IF;
    IF (ops[1]).seq NOT LIKE '%@%' THEN
        ops := ARRAY(SELECT standpipe.with_epoch(p) FROM unnest(ops) p);
    END IF;
    IF cardinality(dids) > 0 THEN
        ignored := standpipe.ensure_users(dids);
    END IF;
    all_of := standpipe.change(repos, handles, ops, kinds);
    IF cardinality(all_of.deltas) > 0 THEN
        ignored := standpipe.count(all_of.deltas);
    END IF;
    IF kinds && '{feed_generator, labeler_service, delete feed_generator, delete labeler_service}' THEN
        all_of.applied := standpipe.change_late(repos, ops, kinds, all_of.applied);
    END IF;
    RETURN all_of.applied;
END $$;

-- Those of these accounts that opted out: nothing new of them is stored. Their deletions still apply.
CREATE OR REPLACE FUNCTION standpipe.forbidden(repos text[]) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN ARRAY(SELECT s.user_did FROM user_settings s WHERE s.user_did = ANY (repos) AND s.data_collection_forbidden);
END $$;

-- A whole repository has been compared with the account's rows: from now on, every older operation is dead. Called before
-- the rows are read, under the account's lock, so that none of them appears afterwards. The fast paths are closed to the
-- account (by a tombstone of its DID) for as long as something older can be on its way.
CREATE OR REPLACE FUNCTION standpipe.complete(account text, revision text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.share_partitions(ARRAY[account]);
    PERFORM pg_advisory_xact_lock(hashtextextended(account, 0));
    INSERT INTO standpipe.accounts AS a (did, complete_rev) VALUES (account, revision)
    ON CONFLICT (did) DO UPDATE SET complete_rev = greatest(a.complete_rev, excluded.complete_rev);
    INSERT INTO standpipe.tombstones AS t (uri, commit_rev, stream_ms, stream_seq)
    VALUES (account, revision, (extract(epoch FROM clock_timestamp()) * 1000)::bigint, 0)
    ON CONFLICT (uri) DO UPDATE SET stream_ms = greatest(t.stream_ms, excluded.stream_ms);
END $$;

-- The revisions of these accounts' whole repositories, by account; NULL if none was compared.
CREATE OR REPLACE FUNCTION standpipe.completed(repos text[]) RETURNS jsonb LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT jsonb_object_agg(a.did, a.complete_rev) FROM standpipe.accounts a
            WHERE a.did = ANY (repos) AND a.complete_rev IS NOT NULL);
END $$;

-- Whether an operation on a record is older than its account's whole repository.
CREATE OR REPLACE FUNCTION standpipe.is_before(o standpipe.op, kind text, completed jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN kind NOT IN ('identity', 'account')
        AND coalesce(coalesce(o.rev, '') COLLATE "C" < (completed ->> o.repo) COLLATE "C", false);
END $$;

-- The operations of standpipe.apply, but for the counters: applies them one by one, and returns what they change there.
CREATE OR REPLACE FUNCTION standpipe.change(repos text[], handles text[], ops standpipe.op[], kinds text[])
RETURNS standpipe.effects LANGUAGE plpgsql AS $$
DECLARE
    o standpipe.op;
    e standpipe.effect;
    all_of standpipe.effects;
    forbidden text[];
    completed jsonb;
    i integer := 0;
BEGIN
    PERFORM FROM standpipe.accounts a WHERE a.did = ANY (repos) AND a.complete_rev IS NOT NULL;
    IF FOUND THEN
        completed := standpipe.completed(repos);
    END IF;
    PERFORM FROM user_settings s WHERE s.user_did = ANY (repos) AND s.data_collection_forbidden;
    IF FOUND THEN
        forbidden := standpipe.forbidden(repos);
    END IF;
    all_of.applied := '{}';
    all_of.deltas := '{}';
    FOREACH o IN ARRAY coalesce(ops, '{}') LOOP
        i := i + 1;
        e.deltas := '{}';
        IF forbidden IS NOT NULL AND o.repo = ANY (forbidden) AND kinds[i] NOT LIKE 'delete %' AND kinds[i] NOT IN ('identity', 'account')
                AND NOT (kinds[i] = 'profile' AND o.body IS NULL) THEN
            all_of.applied := all_of.applied || false;
            CONTINUE;
        END IF;
        IF completed IS NOT NULL AND standpipe.is_before(o, kinds[i], completed) THEN
            all_of.applied := all_of.applied || false;
            CONTINUE;
        END IF;
        -- Most frequent first.
        CASE kinds[i]
            WHEN 'delete like' THEN e := standpipe.delete_like(o);
            WHEN 'profile' THEN e.applied := standpipe.put_profile(o);
            WHEN 'identity' THEN e.applied := cardinality(standpipe.put_handles(ARRAY[o], handles)) > 0;
            WHEN 'account' THEN e.applied := standpipe.put_account(o);
            WHEN 'delete follow' THEN e.applied := standpipe.delete_follow(o);
            WHEN 'delete post' THEN e := standpipe.delete_post(o);
            WHEN 'delete repost' THEN e := standpipe.delete_repost(o);
            WHEN 'block', 'delete block', 'record', 'delete record', 'list_item', 'delete list_item' THEN
                e.applied := standpipe.apply_plain(kinds[i], o);
            WHEN 'like' THEN e := standpipe.put_like(o);
            WHEN 'post' THEN e := standpipe.put_post(o);
            WHEN 'follow' THEN e.applied := standpipe.put_follow(o);
            WHEN 'repost' THEN e := standpipe.put_repost(o);
            WHEN 'thread_gate' THEN e.applied := standpipe.put_thread_gate(o);
            WHEN 'delete thread_gate' THEN e.applied := standpipe.delete_thread_gate(o);
            WHEN 'post_gate' THEN e.applied := standpipe.put_post_gate(o);
            WHEN 'delete post_gate' THEN e.applied := standpipe.delete_post_gate(o);
            WHEN 'bookmark' THEN e := standpipe.put_bookmark(o);
            WHEN 'delete bookmark' THEN e := standpipe.delete_bookmark(o);
            WHEN 'feed_generator', 'labeler_service', 'delete feed_generator', 'delete labeler_service' THEN
                -- Only its counter for now (see change_late): it exists as soon as the record is written, and is
                -- locked if there is a row.
                e.applied := false;
                IF kinds[i] NOT LIKE 'delete %'
                        OR EXISTS (SELECT FROM feed_generators g WHERE g.uri = o.uri)
                        OR EXISTS (SELECT FROM labeler_services s WHERE s.uri = o.uri) THEN
                    e.deltas := ARRAY[ROW(o.uri, 0, 0, 0, 0, 0)::standpipe.delta];
                END IF;
            -- The other plain kinds.
            ELSE e.applied := standpipe.apply_plain(kinds[i], o);
        END CASE;
        all_of.applied := all_of.applied || e.applied;
        all_of.deltas := all_of.deltas || e.deltas;
    END LOOP;
    RETURN all_of;
END $$;

-- Feed generators and labelers copy a counter. Their rows are written after the counters, when the row of the counter is
-- locked: by the writer of the record and by the writer of a like, so that they take turns and never deadlock.
CREATE OR REPLACE FUNCTION standpipe.change_late(
    repos text[], ops standpipe.op[], kinds text[], outcomes boolean[]
) RETURNS boolean[] LANGUAGE plpgsql AS $$
DECLARE
    o standpipe.op;
    forbidden text[] := standpipe.forbidden(repos);
    completed jsonb := standpipe.completed(repos);
BEGIN
    FOR i IN 1 .. cardinality(ops) LOOP
        o := ops[i];
        CONTINUE WHEN completed IS NOT NULL AND standpipe.is_before(o, kinds[i], completed);
        IF kinds[i] LIKE 'delete %' OR o.repo <> ALL (forbidden) THEN
            CASE kinds[i]
                WHEN 'feed_generator' THEN outcomes[i] := standpipe.put_feed_generator(o);
                WHEN 'labeler_service' THEN outcomes[i] := standpipe.put_labeler_service(o);
                WHEN 'delete feed_generator' THEN outcomes[i] := standpipe.delete_feed_generator(o);
                WHEN 'delete labeler_service' THEN outcomes[i] := standpipe.delete_labeler_service(o);
                ELSE
            END CASE;
        END IF;
    END LOOP;
    RETURN outcomes;
END $$;

-- Applies several events, each in its own transaction, with one message from the caller and one back. Returns the
-- concatenated results of standpipe.apply.
--
-- The first refused event ends it: those before it are committed, those after it are not started. The caller then
-- applies all of them again, one message each, which changes nothing for those already applied.
--
-- Most events write a single new record: there is a fast path for those, because PL/pgSQL sets up each expression again
-- in each transaction.
CREATE OR REPLACE PROCEDURE standpipe.apply_each(calls standpipe.call[], INOUT outcomes boolean[]) LANGUAGE plpgsql AS $$
DECLARE
    c standpipe.call;
    o standpipe.op;
    forbidden text[];
BEGIN
    forbidden := ARRAY(SELECT s.user_did FROM unnest(calls) x, user_settings s
                       WHERE s.user_did = (x.record).repo AND s.data_collection_forbidden);
    FOREACH c IN ARRAY calls LOOP
        IF c.kind IS NULL THEN
            outcomes := outcomes || standpipe.apply(
                c.locks, c.repos, c.handles, c.dids, c.sets, c.ops, c.kinds);
        ELSE
            o := c.record;
            IF o.repo <> ALL (forbidden) AND standpipe.put_new(o, c.kind, c.locks, c.dids) THEN
                outcomes := outcomes || true;
            ELSE
                outcomes := outcomes || standpipe.apply(
                    coalesce(c.locks, ARRAY[o.repo]), ARRAY[o.repo], NULL, c.dids, NULL, ARRAY[o], ARRAY[c.kind]);
            END IF;
        END IF;
        COMMIT;
    END LOOP;
END $$;

-- The fast path. locks: NULL if the repository's is the only one. Returns false if it cannot be used; then the locks
-- are held, and the accounts exist.
CREATE OR REPLACE FUNCTION standpipe.put_new(o standpipe.op, kind text, locks text[], dids text[]) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    IF locks IS NULL THEN
        ignored := concat(set_config('synchronous_commit', 'off', true),
                          pg_advisory_xact_lock_shared(29296, (hashtextextended(o.repo, 0) & 63)::integer),
                          pg_advisory_xact_lock(hashtextextended(o.repo, 0)));
    ELSE
        ignored := standpipe.share_partitions(ARRAY[o.repo]);
        ignored := standpipe.lock(locks);
    END IF;
    IF dids IS NOT NULL THEN
        ignored := standpipe.ensure_users(dids);
    END IF;
    IF position('@' IN o.seq) = 0 THEN
        o.seq := standpipe.placed(o.seq, o.ms);
    END IF;
    CASE kind
        WHEN 'like' THEN RETURN standpipe.new_like(o);
        WHEN 'follow' THEN RETURN standpipe.new_follow(o);
        WHEN 'post' THEN RETURN standpipe.new_post(o);
        WHEN 'repost' THEN RETURN standpipe.new_repost(o);
    END CASE;
END $$;
