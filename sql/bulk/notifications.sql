-- The notifications that new records cause.
INSERT INTO notifications (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::timestamp[])
WHERE current_setting('standpipe.notifications', true) IS DISTINCT FROM 'off'
