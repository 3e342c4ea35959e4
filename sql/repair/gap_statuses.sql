-- Those of these accounts ($1) that are here, with what is known of their status.
SELECT u.did, u.account_active, u.account_status FROM users u WHERE u.did = ANY ($1::text[])
