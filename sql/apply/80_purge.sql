-- Removes what an account had written before it was deleted. The newest deletion is a register of the account
-- (standpipe.put_account): older records are dead (standpipe.is_dead), even if they arrive late, and need no
-- tombstones; newer ones live. The account's row in users stays, without its profile.

-- The deletions of an account, as `deleted_seq` holds them: by epoch the greatest number and the latest time (microseconds
-- of Unix time) of its deletions in that epoch. '-1' stands for those without a number. A plain number, or none, is what
-- version 0.1 wrote: one of no named epoch at `deleted_time`.
CREATE OR REPLACE FUNCTION standpipe.deletions(deleted_seq text, deleted_time timestamp) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    place bigint[] := standpipe.place(deleted_seq);
BEGIN
    IF deleted_time IS NULL THEN
        RETURN '{}';
    ELSIF deleted_seq LIKE '{%' THEN
        RETURN deleted_seq::jsonb;
    END IF;
    RETURN jsonb_build_object(place[1]::text,
        jsonb_build_array(place[2], (extract(epoch FROM deleted_time) * 1000000)::bigint));
END $$;

-- The same with another deletion added.
CREATE OR REPLACE FUNCTION standpipe.with_deletion(
    deleted_seq text, deleted_time timestamp, seq text, "time" timestamp
) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    before jsonb := standpipe.deletions(deleted_seq, deleted_time);
    place bigint[] := standpipe.place(seq);
    epoch text := place[1]::text;
BEGIN
    RETURN (before || jsonb_build_object(epoch, jsonb_build_array(
        greatest((before -> epoch ->> 0)::bigint, place[2]),
        greatest((before -> epoch ->> 1)::bigint, (extract(epoch FROM "time") * 1000000)::bigint))))::text;
END $$;

-- Whether a record was written before one of the account's deletions: by the relay's sequence number if both have the
-- same epoch, else by time. A row with neither was written by the old workers, and is older than anything.
CREATE OR REPLACE FUNCTION standpipe.before_deletion(
    rev text, seq text, ms bigint, deleted_seq text, deleted_time timestamp
) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    committed bigint := (extract(epoch FROM standpipe.committed_at(rev, ms, NULL)) * 1000000)::bigint;
    place bigint[] := standpipe.place(seq);
    epoch text;
    deletion jsonb;
BEGIN
    IF deleted_time IS NULL THEN
        RETURN false;
    ELSIF committed IS NULL AND place[2] < 0 THEN
        RETURN true;
    END IF;
    FOR epoch, deletion IN SELECT * FROM jsonb_each(standpipe.deletions(deleted_seq, deleted_time)) LOOP
        IF epoch::bigint = place[1] AND place[2] >= 0 THEN
            IF place[2] < (deletion ->> 0)::bigint THEN
                RETURN true;
            END IF;
        ELSIF coalesce(committed <= (deletion ->> 1)::bigint, true) THEN
            RETURN true;
        END IF;
    END LOOP;
    RETURN false;
END $$;

-- Removes up to `most` rows of one kind that were written before the account was deleted, and counts them out. Returns
-- how many; call it until there are none left.
--
-- Locks are those of standpipe.apply, in its order.
CREATE OR REPLACE FUNCTION standpipe.purge(account text, kind text, most integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    deleted record;
    relation text;
    key text := 'uri';
    owner text;
    condition text;
    old CONSTANT text := ' AND standpipe.before_deletion(r.commit_rev, r.commit_seq, r.stream_ms, $2, $3)';
    keys text[];
    gone_keys text[];
    gone text;
    deltas standpipe.delta[] := '{}';
BEGIN
    SELECT a.deleted_seq, a.deleted_time INTO deleted FROM standpipe.accounts a WHERE a.did = account;
    relation := CASE kind
        WHEN 'like' THEN 'likes' WHEN 'repost' THEN 'reposts' WHEN 'bookmark' THEN 'bookmarks'
        WHEN 'post' THEN 'posts' WHEN 'follow' THEN 'follows' WHEN 'thread_gate' THEN 'thread_gates'
        WHEN 'post_gate' THEN 'post_gates' ELSE (standpipe.plain_table(kind))[1] END;
    IF kind IN ('thread_gate', 'post_gate') THEN
        key := 'post_uri';
    END IF;
    owner := CASE kind
        WHEN 'like' THEN 'user_did' WHEN 'repost' THEN 'user_did' WHEN 'bookmark' THEN 'user_did'
        WHEN 'post' THEN 'author_did' WHEN 'follow' THEN 'follower_did' WHEN 'thread_gate' THEN 'owner_did'
        WHEN 'post_gate' THEN '' ELSE (standpipe.plain_table(kind))[2] END;
    condition := CASE owner
        -- In some tables only the key contains the account. A self-label is removed with its subject.
        WHEN '' THEN
            format('r.%1$I COLLATE "C" >= ''at://'' || $1 || ''/'' AND r.%1$I COLLATE "C" < ''at://'' || $1 || ''0'''
                   ' AND position(''#'' IN r.%1$I) = 0', key)
        ELSE format('r.%I = $1', owner)
    END;
    IF kind IN ('post', 'thread_gate', 'post_gate') THEN
        -- Their own locks come before the account's (at:// before did:), so they are chosen before anything is locked, and
        -- checked again.
        EXECUTE format('SELECT array_agg(s.%1$I ORDER BY s.%1$I COLLATE "C") FROM (
                            SELECT r.%1$I FROM %2$I r WHERE ' || condition || old || ' LIMIT $4) s', key, relation)
            INTO keys USING account, deleted.deleted_seq, deleted.deleted_time, most;
        IF keys IS NULL THEN
            RETURN 0;
        END IF;
        condition := condition || format(' AND r.%I = ANY ($5)', key);
        PERFORM standpipe.share_partitions(ARRAY[account]);
        FOREACH gone IN ARRAY keys LOOP
            PERFORM pg_advisory_xact_lock(hashtextextended(gone, 0));
        END LOOP;
    ELSE
        EXECUTE format('SELECT ARRAY[r.%1$I] FROM %2$I r WHERE ' || condition || ' LIMIT 1', key, relation)
            INTO keys USING account;
        IF keys IS NULL THEN
            RETURN 0;
        END IF;
        PERFORM standpipe.share_partitions(ARRAY[account]);
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended(account, 0));
    EXECUTE format('SELECT array_agg(s.%1$I ORDER BY s.%1$I COLLATE "C") FROM (
                        SELECT r.%1$I FROM %2$I r WHERE ' || condition || old || ' LIMIT $4) s', key, relation)
        INTO gone_keys USING account, deleted.deleted_seq, deleted.deleted_time, most, keys;
    IF gone_keys IS NULL THEN
        -- Gates and posts that were chosen have been rewritten or removed in the meantime; there may be more.
        RETURN (kind IN ('post', 'thread_gate', 'post_gate'))::integer;
    END IF;
    keys := gone_keys;

    IF kind IN ('feed_generator', 'labeler_service') THEN
        -- Their rows are written under the lock of their counter: see standpipe.apply.
        FOREACH gone IN ARRAY keys LOOP
            deltas := deltas || ROW(gone, 0, 0, 0, 0, 0)::standpipe.delta;
        END LOOP;
        PERFORM standpipe.count(deltas);
        deltas := '{}';
    END IF;
    FOREACH gone IN ARRAY keys LOOP
        CASE kind
            WHEN 'like' THEN
                deltas := deltas || standpipe.remove_like(gone);
                PERFORM standpipe.unnotify(gone, ARRAY['', '/via-repost']);
            WHEN 'repost' THEN
                deltas := deltas || standpipe.remove_repost(gone);
                PERFORM standpipe.unnotify(gone, ARRAY['', '/via-repost']);
            WHEN 'bookmark' THEN deltas := deltas || standpipe.remove_bookmark(gone);
            WHEN 'post' THEN deltas := deltas || standpipe.remove_post(gone);
            WHEN 'follow' THEN
                DELETE FROM follows r WHERE r.uri = gone;
                PERFORM standpipe.unnotify(gone, ARRAY['']);
            WHEN 'thread_gate' THEN PERFORM standpipe.remove_thread_gate(gone);
            WHEN 'post_gate' THEN PERFORM standpipe.remove_post_gate(gone);
            ELSE EXECUTE format('DELETE FROM %I r WHERE r.uri = $1', relation) USING gone;
        END CASE;
    END LOOP;
    IF cardinality(deltas) > 0 THEN
        PERFORM standpipe.count(deltas);
    END IF;
    RETURN cardinality(keys);
END $$;

-- An account's newest deletion.
CREATE OR REPLACE FUNCTION standpipe.deletion(deleted_seq text, deleted_time timestamp) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT coalesce(deleted_seq, '') || ' ' || deleted_time::text $$;

-- When every kind has been purged: clears the profile, and records that nothing from before this deletion is left.
-- There may have been a newer deletion in the meantime.
CREATE OR REPLACE FUNCTION standpipe.purged(account text, deletion text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    a standpipe.accounts;
BEGIN
    PERFORM standpipe.share_partitions(ARRAY[account]);
    PERFORM pg_advisory_xact_lock(hashtextextended(account, 0));
    SELECT * INTO a FROM standpipe.accounts x WHERE x.did = account;
    IF a.deleted_time IS NULL THEN
        RETURN;
    END IF;
    IF standpipe.before_deletion(a.profile_rev, a.profile_seq, a.profile_ms, a.deleted_seq, a.deleted_time) THEN
        UPDATE users u SET
            display_name = NULL, description = NULL, avatar_url = NULL, banner_url = NULL,
            pinned_post = NULL, profile_record = NULL
        WHERE u.did = account;
        PERFORM standpipe.unlabel_self('at://' || account || '/app.bsky.actor.profile/self');
    END IF;
    UPDATE standpipe.accounts x SET purge_pending = false
    WHERE x.did = account AND standpipe.deletion(x.deleted_seq, x.deleted_time) = deletion;
END $$;
