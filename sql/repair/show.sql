-- What is known about an account ($1): the revision of its last comparison with its repository, and its place in the queue.
SELECT a.complete_rev::text, r.state, r.reason, r.message
FROM (SELECT $1::text AS did) one
LEFT JOIN standpipe.accounts a ON a.did = one.did LEFT JOIN standpipe.repos r ON r.did = one.did
