-- The accounts in the tables after this one ($1).
SELECT u.did FROM users u WHERE u.did > $1 ORDER BY u.did LIMIT 1000
