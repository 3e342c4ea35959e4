-- Notifications are a function of the record that causes them: the recipient is the authority of the URI that the
-- record points at, or a DID that it names, and nobody is notified of their own actions. It does not matter whether the
-- recipient or the record's subject is known here.
--
-- They belong to the record's repository, whose lock the caller has: no two transactions write the same one. Their keys
-- are the record's URI with a suffix, so that those of a removed row are known without a search.
--
-- standpipe.notifications says which there are. off: the table belongs to somebody else. A number of seconds: none of what
-- was older than that when it arrived, so that nobody is told of what a repair or a backfill finds. on, or unset: all.

-- Whether what arrived at this time, in milliseconds, and has this date causes notifications.
CREATE OR REPLACE FUNCTION standpipe.notifies(arrived bigint, dated timestamp) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT CASE coalesce(current_setting('standpipe.notifications', true), '')
        WHEN '' THEN true
        WHEN 'on' THEN true
        WHEN 'off' THEN false
        ELSE dated >= timestamp 'epoch' + interval '1 second'
            * (arrived / 1000 - current_setting('standpipe.notifications')::bigint)
    END
$$;

-- replaces: an older version of the record may have left a notification under this key.
CREATE OR REPLACE FUNCTION standpipe.notify(
    o standpipe.op, ending text, recipient text, why text, about text, replaces boolean
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO notifications AS n (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
    SELECT o.uri || '#notification' || ending, recipient, o.repo, why, about, o.cid, o.sort_at
    WHERE standpipe.notifies(o.ms, o.sort_at)
      AND recipient LIKE 'did:%' AND recipient <> o.repo
      -- A value too long for the columns is not a reason to lose the record.
      AND length(recipient) <= 255 AND length(o.uri) + length(ending) <= 499
      AND (about IS NULL OR length(about) <= 512)
    -- Whether it was read is up to the application, and applies to this recipient only.
    ON CONFLICT (uri) DO UPDATE SET
        recipient_did = excluded.recipient_did, author_did = excluded.author_did, reason = excluded.reason,
        reason_subject = excluded.reason_subject, cid = excluded.cid, created_at = excluded.created_at,
        is_read = n.is_read AND n.recipient_did = excluded.recipient_did;
    IF replaces AND NOT FOUND THEN
        PERFORM standpipe.unnotify(o.uri, ARRAY[ending]);
    END IF;
END $$;

-- For one new like, repost or follow.
CREATE OR REPLACE FUNCTION standpipe.notify_one(o standpipe.op, recipient text, why text, about text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO notifications (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
    SELECT o.uri || '#notification', recipient, o.repo, why, about, o.cid, o.sort_at
    WHERE standpipe.notifies(o.ms, o.sort_at)
      AND recipient LIKE 'did:%' AND recipient <> o.repo AND length(recipient) <= 255 AND length(o.uri) <= 499
      AND (about IS NULL OR length(about) <= 512);
END $$;

-- Removes the notifications of a deleted record, or those that an update no longer causes.
CREATE OR REPLACE FUNCTION standpipe.unnotify(record text, endings text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('standpipe.notifications', true) = 'off' THEN
        RETURN;
    END IF;
    FOR i IN 1 .. cardinality(endings) LOOP
        DELETE FROM notifications n WHERE n.uri = record || '#notification' || endings[i];
    END LOOP;
END $$;

-- For a like or repost: notifies the owner of its subject, and the account of `via`, if that is a different one.
CREATE OR REPLACE FUNCTION standpipe.notify_pointer(o standpipe.op, why text, replaces boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    owner text := split_part(o.subject, '/', 3);
    via text;
    ignored text;
BEGIN
    ignored := standpipe.notify(o, '', owner, why, o.subject, replaces);
    IF replaces OR o.body IS NOT NULL THEN
        via := o.body ->> 'uri';
        IF via NOT LIKE 'at://%' OR split_part(via, '/', 3) = owner THEN
            via := NULL;
        END IF;
        ignored := standpipe.notify(o, '/via-repost', split_part(via, '/', 3), why || '-via-repost', via, replaces);
    END IF;
END $$;

-- The accounts that a post's facets mention: each once, in order of appearance, at most 50.
CREATE OR REPLACE FUNCTION standpipe.mentioned(facets jsonb) RETURNS text[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    dids text[] := '{}';
    did text;
BEGIN
    IF facets @> '[{"features": [{"$type": "app.bsky.richtext.facet#mention"}]}]' THEN
        FOR did IN
            SELECT feature ->> 'did'
            FROM jsonb_array_elements(facets) WITH ORDINALITY AS f (facet, place),
                 jsonb_array_elements(CASE WHEN jsonb_typeof(facet -> 'features') = 'array'
                                           THEN facet -> 'features' END) WITH ORDINALITY AS g (feature, part)
            WHERE feature ->> '$type' = 'app.bsky.richtext.facet#mention'
            ORDER BY place, part
        LOOP
            IF did LIKE 'did:%' AND NOT did = ANY (dids) THEN
                dids := dids || did;
                EXIT WHEN cardinality(dids) = 50;
            END IF;
        END LOOP;
    END IF;
    RETURN dids;
END $$;

-- For a post: notifies the parent's author, the quoted post's author, and everybody whom it mentions. The subject is
-- the post itself, which is what the application shows for them. former: the facets of
-- the version that it replaces, if any.
CREATE OR REPLACE FUNCTION standpipe.notify_post(o standpipe.op, replaces boolean, former jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    parent text := o.body ->> 'parent_uri';
    ignored text;
BEGIN
    IF parent IS NOT NULL OR replaces THEN
        ignored := standpipe.notify(o, '/reply', split_part(parent, '/', 3), 'reply', o.uri, replaces);
    END IF;
    IF o.subject IS NOT NULL OR replaces THEN
        ignored := standpipe.notify(o, '/quote', split_part(o.subject, '/', 3), 'quote', o.uri, replaces);
    END IF;
    ignored := standpipe.notify_mentioned(o, former);
END $$;

-- For a post: notifies those whom its facets mention. former: see notify_post.
CREATE OR REPLACE FUNCTION standpipe.notify_mentioned(o standpipe.op, former jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    facets jsonb := o.body -> 'facets';
    dids text[] := '{}';
    did text;
    ignored text;
BEGIN
    IF facets IS NOT NULL THEN
        dids := standpipe.mentioned(facets);
        FOREACH did IN ARRAY dids LOOP
            ignored := standpipe.notify(o, '/mention/' || did, did, 'mention', o.uri, false);
        END LOOP;
    END IF;
    IF former IS NOT NULL THEN
        ignored := standpipe.unnotify(o.uri, ARRAY(
            SELECT '/mention/' || d FROM unnest(standpipe.mentioned(former)) d WHERE NOT d = ANY (dids)));
    END IF;
END $$;
