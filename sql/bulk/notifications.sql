-- The notifications that new records cause.
INSERT INTO notifications (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::text[]), unnest($5::text[]),
    unnest($6::text[]), unnest($7::timestamp[])
WHERE current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
