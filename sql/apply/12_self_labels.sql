-- com.atproto.label.defs#selfLabels in a post or profile: the author's own labels, as rows of labels under
-- '<its URI>#label/<value>'. They change and disappear with the record.
--
-- vals: a JSON list of the values, NULL for none. replaces: an older version of the record may have left some.
CREATE OR REPLACE FUNCTION standpipe.label_self(o standpipe.op, vals jsonb, replaces boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    value text;
BEGIN
    IF replaces THEN
        -- A record of com.atproto.label.label about it has a URI of another form.
        DELETE FROM labels l
        WHERE l.subject = o.uri AND l.uri = o.uri || '#label/' || l.val AND NOT coalesce(vals ? l.val, false);
    END IF;
    IF vals IS NOT NULL THEN
        FOR value IN SELECT jsonb_array_elements_text(vals) LOOP
            INSERT INTO labels (uri, src, subject, val, neg, created_at,
                                commit_rev, commit_seq, stream_ms, stream_seq)
            VALUES (o.uri || '#label/' || value, o.repo, o.uri, value, false, o.created_at,
                    o.rev, o.seq, o.ms, o.sq)
            ON CONFLICT (uri) DO UPDATE SET
                src = excluded.src, subject = excluded.subject, val = excluded.val, neg = excluded.neg,
                created_at = excluded.created_at, commit_rev = excluded.commit_rev,
                commit_seq = excluded.commit_seq, stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq;
        END LOOP;
    END IF;
END $$;

-- Removes those of a deleted post.
CREATE OR REPLACE FUNCTION standpipe.unlabel_self(gone text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM labels l WHERE l.subject = gone AND l.uri = gone || '#label/' || l.val;
END $$;
