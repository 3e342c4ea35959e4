-- Kinds whose row just holds the record's fields, without counters and notifications. subject and body
-- for each:
--
--   block              subject: the DID of the blocked account
--   record             any other collection, kept whole. subject: the record's $type; body: the record
--   list               body: name, purpose, description, avatar_url
--   list_item          subject: the DID on the list; body: list
--   list_block         subject: the list's URI
--   starter_pack       subject: its list's URI; body: name, description, feeds (their URIs)
--   label              subject: what is labelled; body: val, neg. The signer of the record is its source.
--   verification       subject: the verified DID; body: handle
--   feed_generator     subject: the DID of its service; body: display_name, description, avatar_url
--   labeler_service    body: policies
--
-- One template, instantiated for each table: each has its own functions, so that their statements are planned once
-- (put_list and delete_list, and so on; put_all_list and delete_all_list for operations on different records, which return
-- the URIs of those that they changed). Functions that name all kinds are generated from the same list: a new kind is one
-- line here. The likes of a feed generator or labeler are counted like those of a post, and copied: see
-- standpipe.apply for why their rows are written after the counters.
DO $do$
DECLARE
    -- kind, table, its own columns, their values, and the column that holds the repository's account: '' if only the
    -- key contains it.
    wanted CONSTANT text[][] := ARRAY[
        ARRAY['block', 'blocks', 'blocker_did, blocked_did', 'o.repo, o.subject', 'blocker_did'],
        ARRAY['record', 'generic_records', 'cid, author_did, record_type, record', 'o.cid, o.repo, o.subject, o.body',
            'author_did'],
        ARRAY['list', 'lists', 'cid, creator_did, name, purpose, description, avatar_url',
            $$o.cid, o.repo, o.body ->> 'name', o.body ->> 'purpose', o.body ->> 'description',
              o.body ->> 'avatar_url'$$, 'creator_did'],
        ARRAY['list_item', 'list_items', 'cid, list_uri, subject_did', $$o.cid, o.body ->> 'list', o.subject$$, ''],
        ARRAY['list_block', 'list_blocks', 'blocker_did, list_uri', $$o.repo, o.subject$$, 'blocker_did'],
        ARRAY['starter_pack', 'starter_packs', 'cid, creator_did, name, description, list_uri, feeds',
            $$o.cid, o.repo, o.body ->> 'name', o.body ->> 'description', o.subject, o.body -> 'feeds'$$, 'creator_did'],
        ARRAY['label', 'labels', 'src, subject, val, neg',
            $$o.repo, o.subject, o.body ->> 'val', (o.body ->> 'neg')::boolean$$, ''],
        ARRAY['verification', 'verifications', 'cid, subject_did, handle, verified_at',
            $$o.cid, o.subject, o.body ->> 'handle', o.created_at$$, ''],
        ARRAY['feed_generator', 'feed_generators',
            'cid, creator_did, did, display_name, description, avatar_url, like_count',
            $$o.cid, o.repo, o.subject, o.body ->> 'display_name', o.body ->> 'description',
              o.body ->> 'avatar_url', standpipe.like_count(o.uri)$$, 'creator_did'],
        ARRAY['labeler_service', 'labeler_services', 'cid, creator_did, policies, like_count',
            $$o.cid, o.repo, o.body -> 'policies', standpipe.like_count(o.uri)$$, 'creator_did']
    ];
    kind text[];
BEGIN
    FOREACH kind SLICE 1 IN ARRAY wanted LOOP
        EXECUTE format($sql$
            CREATE OR REPLACE FUNCTION standpipe.put_%1$s(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN
                IF standpipe.is_dead(o) THEN
                    RETURN false;
                END IF;
                INSERT INTO %2$I AS r (uri, %3$s, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
                VALUES (o.uri, %4$s, o.created_at, o.rev, o.seq, o.ms, o.sq)
                ON CONFLICT (uri) DO UPDATE SET
                    (%3$s, created_at, commit_rev, commit_seq, stream_ms, stream_seq) =
                    (%5$s, excluded.created_at, excluded.commit_rev, excluded.commit_seq,
                     excluded.stream_ms, excluded.stream_seq)
                WHERE standpipe.newer(
                    excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                    r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
                RETURN FOUND;
            END $$;

            CREATE OR REPLACE FUNCTION standpipe.delete_%1$s(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM standpipe.put_tombstone(o);
                DELETE FROM %2$I r WHERE r.uri = o.uri AND standpipe.newer(
                    o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
                RETURN FOUND;
            END $$;

            -- The same for several at once.
            CREATE OR REPLACE FUNCTION standpipe.put_all_%1$s(ops standpipe.op[]) RETURNS text[] LANGUAGE plpgsql AS $$
            DECLARE
                changed text[];
            BEGIN
                WITH w AS (
                    INSERT INTO %2$I AS r (uri, %3$s, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
                    SELECT o.uri, %4$s, o.created_at, o.rev, o.seq, o.ms, o.sq
                    FROM unnest(ops) o WHERE NOT standpipe.is_dead(o)
                    ON CONFLICT (uri) DO UPDATE SET
                        (%3$s, created_at, commit_rev, commit_seq, stream_ms, stream_seq) =
                        (%5$s, excluded.created_at, excluded.commit_rev, excluded.commit_seq,
                         excluded.stream_ms, excluded.stream_seq)
                    WHERE standpipe.newer(
                        excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                        r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
                    RETURNING r.uri
                )
                SELECT array_agg(w.uri) INTO changed FROM w;
                RETURN changed;
            END $$;

            CREATE OR REPLACE FUNCTION standpipe.delete_all_%1$s(ops standpipe.op[]) RETURNS text[] LANGUAGE plpgsql AS $$
            DECLARE
                o standpipe.op;
                changed text[];
            BEGIN
                FOREACH o IN ARRAY ops LOOP
                    PERFORM standpipe.put_tombstone(o);
                END LOOP;
                WITH w AS (
                    DELETE FROM %2$I r USING unnest(ops) d
                    -- The keys once more, so that rows are found by them, whatever the planner believes of a young table.
                    WHERE r.uri = d.uri AND r.uri = ANY (ARRAY(SELECT k.uri FROM unnest(ops) k)) AND standpipe.newer(
                        d.rev, d.seq, d.ms, d.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)
                    RETURNING r.uri
                )
                SELECT array_agg(w.uri) INTO changed FROM w;
                RETURN changed;
            END $$;
            $sql$,
            kind[1], kind[2], kind[3], kind[4],
            (SELECT string_agg('excluded.' || c, ', ') FROM unnest(string_to_array(kind[3], ', ')) c));
    END LOOP;

    -- Dispatches to the kind's function.
    EXECUTE format($sql$
        CREATE OR REPLACE FUNCTION standpipe.apply_plain(kind text, o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            CASE kind %s
            END CASE;
        END $$;
        $sql$,
        (SELECT string_agg(format('
                WHEN %1$L THEN RETURN standpipe.put_%1$s(o);
                WHEN %2$L THEN RETURN standpipe.delete_%1$s(o);', wanted[i][1], 'delete ' || wanted[i][1]), '' ORDER BY i)
         FROM generate_subscripts(wanted, 1) i));

    -- The same for several at once.
    EXECUTE format($sql$
        CREATE OR REPLACE FUNCTION standpipe.apply_all_plain(kind text, ops standpipe.op[]) RETURNS text[] LANGUAGE plpgsql AS $$
        BEGIN
            CASE kind %s
            END CASE;
        END $$;
        $sql$,
        (SELECT string_agg(format('
                WHEN %1$L THEN RETURN standpipe.put_all_%1$s(ops);
                WHEN %2$L THEN RETURN standpipe.delete_all_%1$s(ops);', wanted[i][1], 'delete ' || wanted[i][1]), '' ORDER BY i)
         FROM generate_subscripts(wanted, 1) i));

    -- The table of a kind, and the column that holds the repository's account.
    EXECUTE format($sql$
        CREATE OR REPLACE FUNCTION standpipe.plain_table(kind text) RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
            SELECT CASE kind %s END
        $$;
        $sql$,
        (SELECT string_agg(format(' WHEN %L THEN ARRAY[%L, %L]', wanted[i][1], wanted[i][2], wanted[i][5]), '' ORDER BY i)
         FROM generate_subscripts(wanted, 1) i));

    -- The rows under a key, with the kind of their delete and their versions.
    EXECUTE format($sql$
        CREATE OR REPLACE FUNCTION standpipe.plain_rows(key text) RETURNS TABLE (
            kind text, subject text, commit_rev text, commit_seq text, stream_ms bigint, stream_seq bigint
        ) LANGUAGE sql STABLE AS $$ %s $$;
        $sql$,
        (SELECT string_agg(format('
            SELECT %L::text, NULL::text, r.commit_rev::text, r.commit_seq::text, r.stream_ms, r.stream_seq
            FROM %I r WHERE r.uri = key', 'delete ' || wanted[i][1], wanted[i][2]), ' UNION ALL ' ORDER BY i)
         FROM generate_subscripts(wanted, 1) i));
END $do$;

CREATE OR REPLACE FUNCTION standpipe.like_count(subject text) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    RETURN coalesce((SELECT a.like_count FROM post_aggregations a WHERE a.post_uri = subject), 0);
END $$;
