-- Shows the statuses that are new ($1: DIDs; $2: whether they are active; $3: the status).
UPDATE users u SET account_active = o.active, account_status = o.status
FROM unnest($1::text[], $2::boolean[], $3::text[]) AS o (did, active, status)
WHERE u.did = o.did AND u.did = ANY ($1)
