-- Every account that an event mentions has a row. `dids` is sorted: two transactions that insert the same
-- accounts do so in the same order.
CREATE OR REPLACE FUNCTION standpipe.ensure_users(dids text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    account text;
BEGIN
    IF cardinality(dids) > 3 THEN
        INSERT INTO users (did, handle)
        SELECT d, 'handle.invalid' FROM unnest(dids) d WHERE NOT EXISTS (SELECT FROM users u WHERE u.did = d)
        ORDER BY d COLLATE "C"
        ON CONFLICT (did) DO NOTHING;
        RETURN;
    END IF;
    FOREACH account IN ARRAY dids LOOP
        PERFORM FROM users u WHERE u.did = account;
        IF NOT FOUND THEN
            INSERT INTO users (did, handle) VALUES (account, 'handle.invalid') ON CONFLICT (did) DO NOTHING;
        END IF;
    END LOOP;
END $$;

-- app.bsky.actor.profile/self. A register of the account: a delete writes an empty value (body NULL), so it
-- needs no tombstone. body: display_name, description, avatar_url, banner_url, pinned_post, record; labels, a list of
-- the values of its self-labels, where it has some.
CREATE OR REPLACE FUNCTION standpipe.put_profile(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
BEGIN
    INSERT INTO standpipe.accounts AS a (did, profile_rev, profile_seq, profile_ms, profile_sq)
    VALUES (o.repo, o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (did) DO UPDATE SET
        profile_rev = excluded.profile_rev, profile_seq = excluded.profile_seq,
        profile_ms = excluded.profile_ms, profile_sq = excluded.profile_sq
    WHERE standpipe.newer(excluded.profile_rev, excluded.profile_seq, excluded.profile_ms, excluded.profile_sq,
                          a.profile_rev, a.profile_seq, a.profile_ms, a.profile_sq);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM FROM standpipe.accounts a
    WHERE a.did = o.repo AND a.deleted_time IS NOT NULL
      AND standpipe.before_deletion(o.rev, o.seq, o.ms, a.deleted_seq, a.deleted_time);
    IF FOUND THEN
        -- It was written before the account was deleted, and no longer applies.
        o.body := NULL;
    END IF;
    UPDATE users u SET
        display_name = o.body ->> 'display_name', description = o.body ->> 'description',
        avatar_url = o.body ->> 'avatar_url', banner_url = o.body ->> 'banner_url',
        pinned_post = o.body -> 'pinned_post', profile_record = o.body -> 'record'
    WHERE u.did = o.repo;
    ignored := standpipe.label_self(o, o.body -> 'labels', true);
    RETURN true;
END $$;

-- #identity, each for another account and with another handle (subject). Two registers: the newest handle claimed for an
-- account, and the newest claimant of a handle. A user shows its newest handle while it is that handle's newest claimant,
-- else handle.invalid. `locked` holds the handles whose locks the caller took; an account's handle that changed since the
-- caller looked is not among them, and the transaction is tried again. Returns the accounts and the handles that changed.
CREATE OR REPLACE FUNCTION standpipe.put_handles(ops standpipe.op[], locked text[]) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    claimants CONSTANT text[] := ARRAY(SELECT o.repo FROM unnest(ops) o);
    dids text[];
    handles text[];
    other text;
BEGIN
    SELECT a.handle INTO other FROM unnest(ops) o, LATERAL (
        SELECT x.handle FROM standpipe.accounts x WHERE x.did = o.repo AND x.handle IS NOT NULL OFFSET 0) a
    EXCEPT SELECT unnest(locked) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the account of % has another handle now', other USING ERRCODE = 'serialization_failure';
    END IF;
    WITH w AS (
        INSERT INTO standpipe.accounts AS a (did, handle, handle_seq, handle_ms, handle_sq)
        SELECT o.repo, o.subject, o.seq, o.ms, o.sq FROM unnest(ops) o
        ON CONFLICT (did) DO UPDATE SET
            handle = excluded.handle, handle_seq = excluded.handle_seq,
            handle_ms = excluded.handle_ms, handle_sq = excluded.handle_sq
        WHERE a.handle IS NULL OR standpipe.newer(
            NULL, excluded.handle_seq, excluded.handle_ms, excluded.handle_sq,
            NULL, a.handle_seq, a.handle_ms, a.handle_sq)
        RETURNING a.did
    )
    SELECT array_agg(w.did) INTO dids FROM w;
    WITH w AS (
        INSERT INTO standpipe.handles AS h (handle, did, seq, ms, sq)
        SELECT o.subject, o.repo, o.seq, o.ms, o.sq FROM unnest(ops) o
        ON CONFLICT (handle) DO UPDATE SET
            did = excluded.did, seq = excluded.seq, ms = excluded.ms, sq = excluded.sq
        WHERE standpipe.newer(NULL, excluded.seq, excluded.ms, excluded.sq, NULL, h.seq, h.ms, h.sq)
        RETURNING h.handle
    )
    SELECT array_agg(w.handle) INTO handles FROM w;
    -- Those who showed it before, then those who claim it. OFFSET 0 and the keys once more: rows are found by their keys,
    -- whatever the planner believes of a young table.
    UPDATE users u SET handle = 'handle.invalid'
    FROM (SELECT h.* FROM unnest(handles) k (handle), LATERAL (
              SELECT x.handle, x.did FROM standpipe.handles x WHERE x.handle = k.handle OFFSET 0) h OFFSET 0) h
    WHERE u.handle = h.handle AND u.handle = ANY (handles) AND u.did <> h.did;
    UPDATE users u SET handle = shown.handle
    FROM (SELECT o.repo AS did, CASE WHEN h.did = o.repo THEN a.handle ELSE 'handle.invalid' END AS handle
          FROM unnest(ops) o, LATERAL (
              SELECT x.handle FROM standpipe.accounts x WHERE x.did = o.repo OFFSET 0) a, LATERAL (
              SELECT x.did FROM standpipe.handles x WHERE x.handle = a.handle OFFSET 0) h OFFSET 0) shown
    WHERE u.did = shown.did AND u.did = ANY (claimants) AND u.handle IS DISTINCT FROM shown.handle;
    RETURN coalesce(dids, '{}') || coalesce(handles, '{}');
END $$;

-- Applies #identity operations like those of standpipe.put_handles, in a transaction of their own.
CREATE OR REPLACE FUNCTION standpipe.claim(dids text[], ops standpipe.op[]) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    handles text[];
    ignored text;
BEGIN
    -- First, so that none of these accounts gets another handle meanwhile.
    ignored := standpipe.lock_partitions(ARRAY(SELECT o.repo FROM unnest(ops) o));
    handles := ARRAY(
        SELECT o.subject FROM unnest(ops) o
        UNION
        SELECT a.handle FROM unnest(ops) o, LATERAL (
            SELECT x.handle FROM standpipe.accounts x WHERE x.did = o.repo AND x.handle IS NOT NULL OFFSET 0) a);
    ignored := standpipe.lock(ARRAY(SELECT '@' || h FROM unnest(handles) h ORDER BY '@' || h COLLATE "C"));
    IF EXISTS (SELECT FROM unnest(ops) o WHERE o.seq NOT LIKE '%@%') THEN
        ops := ARRAY(SELECT standpipe.with_epoch(p) FROM unnest(ops) p);
    END IF;
    IF cardinality(dids) > 0 THEN
        ignored := standpipe.ensure_users(dids);
    END IF;
    RETURN standpipe.put_handles(ops, handles);
END $$;

-- Which of two statuses of an account is newer: by epoch and number; if neither has a number, by the event's time. With
-- the same number, it is a repeat of the same event.
CREATE OR REPLACE FUNCTION standpipe.newer_status(
    seq text, "time" timestamp, ms bigint, sq bigint,
    than_seq text, than_time timestamp, than_ms bigint, than_sq bigint
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN than_time IS NULL THEN true
        WHEN standpipe.place(seq) <> standpipe.place(than_seq) THEN standpipe.place(seq) > standpipe.place(than_seq)
        WHEN standpipe.place(seq) = '{-1,-1}' THEN ("time", ms, sq) > (than_time, than_ms, than_sq)
        ELSE false
    END
$$;

-- Shows the statuses of accounts. Of those that are active, a repair that found nothing to fetch while they were not is due
-- again, and so is one that is under way and may find nothing.
CREATE OR REPLACE FUNCTION standpipe.show_statuses(dids text[], active boolean[], statuses text[]) RETURNS void
LANGUAGE sql AS $$
    UPDATE users u SET account_active = o.active, account_status = o.status
    FROM unnest(dids, active, statuses) AS o (did, active, status)
    WHERE u.did = o.did AND u.did = ANY (dids);
    UPDATE standpipe.repos r SET
        state = 'queued', requests = r.requests + 1,
        attempts = CASE r.state WHEN 'queued' THEN r.attempts ELSE 0 END,
        retry_at = CASE r.state WHEN 'queued' THEN r.retry_at ELSE greatest(now(), r.retry_at) END
    FROM unnest(dids, active) AS o (did, active)
    WHERE r.did = o.did AND r.did = ANY (dids) AND o.active AND r.state IN ('gone', 'queued')
$$;

-- #account. subject: the status word or NULL; created_at: the event's time; body: true when the account is active.
-- Status is a register: see standpipe.newer_status. A deletion is a second register, which only grows: records older
-- than it are dead, whatever the status becomes later (80_purge.sql).
CREATE OR REPLACE FUNCTION standpipe.put_account(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    changed boolean;
BEGIN
    INSERT INTO standpipe.accounts AS a (did, status_seq, status_time, status_ms, status_sq)
    VALUES (o.repo, o.seq, o.created_at, o.ms, o.sq)
    ON CONFLICT (did) DO UPDATE SET
        status_seq = excluded.status_seq, status_time = excluded.status_time,
        status_ms = excluded.status_ms, status_sq = excluded.status_sq
    WHERE standpipe.newer_status(excluded.status_seq, excluded.status_time, excluded.status_ms, excluded.status_sq,
                                 a.status_seq, a.status_time, a.status_ms, a.status_sq);
    changed := FOUND;
    IF changed THEN
        PERFORM standpipe.show_statuses(ARRAY[o.repo], ARRAY[o.body = 'true'], ARRAY[o.subject]);
    END IF;
    IF o.subject = 'deleted' AND o.body = 'false' THEN
        -- Lets the functions for new records recognise the account. Sweeps never reach this one.
        INSERT INTO standpipe.tombstones (uri, stream_ms, stream_seq) VALUES (o.repo, 9223372036854775807, 0)
        ON CONFLICT (uri) DO UPDATE SET stream_ms = excluded.stream_ms
        WHERE tombstones.stream_ms < excluded.stream_ms;
        UPDATE standpipe.accounts a SET
            deleted_seq = standpipe.with_deletion(a.deleted_seq, a.deleted_time, o.seq, o.created_at),
            deleted_time = greatest(a.deleted_time, o.created_at),
            purge_pending = true
        WHERE a.did = o.repo
          AND (a.deleted_time IS NULL OR a.deleted_seq IS DISTINCT FROM
               standpipe.with_deletion(a.deleted_seq, a.deleted_time, o.seq, o.created_at));
    END IF;
    RETURN changed;
END $$;

