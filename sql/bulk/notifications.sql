-- The notifications that new records cause.
INSERT INTO notifications (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
SELECT n.uri, n.recipient, n.author, n.reason, n.about, n.cid, n.dated
FROM (SELECT unnest($1::text[]) AS uri, unnest($2::text[]) AS recipient, unnest($3::text[]) AS author,
             unnest($4::text[]) AS reason, unnest($5::text[]) AS about, unnest($6::text[]) AS cid,
             unnest($7::timestamp[]) AS dated, unnest($8::bigint[]) AS arrived) n
WHERE standpipe.notifies(n.arrived, n.dated)
