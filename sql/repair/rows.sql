-- The rows of an account's records: the path (of gates: of their post), the CID where the table has one, else the subject;
-- the kind of row; and its revision. A self-label belongs to its subject, not to a record of its own.
WITH own (low, high) AS (VALUES ('at://' || $1 || '/', 'at://' || $1 || '0'))
SELECT r.uri::text, r.cid::text, NULL::text, 'record', r.commit_rev::text FROM posts r WHERE r.author_did = $1
UNION ALL SELECT r.uri, NULL, r.post_uri, 'record', r.commit_rev::text FROM likes r WHERE r.user_did = $1
UNION ALL SELECT r.uri, NULL, r.post_uri, 'record', r.commit_rev::text FROM reposts r WHERE r.user_did = $1
UNION ALL SELECT r.uri, NULL, r.post_uri, 'record', r.commit_rev::text FROM bookmarks r WHERE r.user_did = $1
UNION ALL SELECT r.uri, NULL, r.following_did, 'record', r.commit_rev::text FROM follows r WHERE r.follower_did = $1
UNION ALL SELECT r.uri, NULL, r.blocked_did, 'record', r.commit_rev::text FROM blocks r WHERE r.blocker_did = $1
UNION ALL SELECT r.uri, NULL, r.list_uri, 'record', r.commit_rev::text FROM list_blocks r WHERE r.blocker_did = $1
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM lists r WHERE r.creator_did = $1
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM feed_generators r WHERE r.creator_did = $1
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM starter_packs r WHERE r.creator_did = $1
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM labeler_services r WHERE r.creator_did = $1
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM generic_records r WHERE r.author_did = $1
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM list_items r, own
    WHERE r.uri COLLATE "C" >= own.low AND r.uri COLLATE "C" < own.high
UNION ALL SELECT r.uri, r.cid, NULL, 'record', r.commit_rev::text FROM verifications r, own
    WHERE r.uri COLLATE "C" >= own.low AND r.uri COLLATE "C" < own.high
UNION ALL SELECT r.uri, NULL, NULL, 'record', r.commit_rev::text FROM labels r, own
    WHERE r.uri COLLATE "C" >= own.low AND r.uri COLLATE "C" < own.high AND position('#' IN r.uri) = 0
UNION ALL SELECT r.post_uri, NULL, NULL, 'thread_gate', r.commit_rev::text FROM thread_gates r WHERE r.owner_did = $1
UNION ALL SELECT r.post_uri, NULL, NULL, 'post_gate', r.commit_rev::text FROM post_gates r, own
    WHERE r.post_uri COLLATE "C" >= own.low AND r.post_uri COLLATE "C" < own.high
UNION ALL SELECT 'at://' || $1 || '/app.bsky.actor.profile/self', NULL, NULL, 'record', (SELECT a.profile_rev FROM standpipe.accounts a WHERE a.did = $1) FROM users r
    WHERE r.did = $1 AND r.profile_record IS NOT NULL
