//! The database of the workers before standpipe, built from its recorded schema.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use super::{connect, query_rows};

/// Creates its tables and indexes, all empty.
pub async fn create(url: &str) {
    connect(url).await.batch_execute(&(tables() + &indexes())).await.unwrap();
}

/// The same with 430,000 rows, inserted in one go before the indexes are created.
pub async fn create_full(url: &str) {
    let sql = [&tables(), FILL, &indexes()].join("\n");
    let client = connect(url).await;
    client.batch_execute(&sql).await.unwrap();
    client.batch_execute("VACUUM ANALYZE").await.unwrap();
}

/// Turns its unique indexes into constraints: there are databases of either kind.
pub async fn make_constraints(url: &str) {
    let uniques = fixture("existing-indexes.tsv").into_iter().filter(|line| line[1].starts_with("unique_"));
    let sql: Vec<String> =
        uniques.map(|line| format!("ALTER TABLE {} ADD UNIQUE USING INDEX {}", line[0], line[1])).collect();
    connect(url).await.batch_execute(&sql.join(";")).await.unwrap();
}

fn fixture(name: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().skip(1).map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

fn tables() -> String {
    let mut columns = BTreeMap::<String, Vec<String>>::new();
    for line in fixture("existing-database.tsv") {
        let [table, name, kind, rest @ ..] = line.as_slice() else { panic!("{line:?}") };
        let null = rest.first().map_or("", String::as_str);
        let definition = match rest.get(1).map(String::as_str) {
            Some(default) if default.contains("nextval") => format!("{name} serial"),
            None | Some("") => format!("{name} {kind} {null}"),
            Some(default) => format!("{name} {kind} DEFAULT {default} {null}"),
        };
        columns.entry(table.clone()).or_default().push(definition);
    }
    let mut sql = String::new();
    for (table, columns) in columns {
        write!(sql, "CREATE TABLE {table} ({});", columns.join(", ")).unwrap();
    }
    sql
}

fn indexes() -> String {
    let mut sql = String::new();
    for line in fixture("existing-indexes.tsv") {
        let [table, name, definition] = line.as_slice() else { panic!("{line:?}") };
        let (unique, on) = match definition.strip_prefix("UNIQUE ") {
            Some(on) => ("UNIQUE", on),
            None => ("", definition.as_str()),
        };
        write!(sql, "CREATE {unique} INDEX {name} ON {table} {on};").unwrap();
        if name.ends_with("_pkey") {
            write!(sql, "ALTER TABLE {table} ADD PRIMARY KEY USING INDEX {name};").unwrap();
        }
    }
    sql
}

/// Everything that a change to the tables can affect: columns, indexes, constraints, other schemas.
pub async fn catalogue(url: &str) -> Vec<Vec<Option<String>>> {
    let mut found = query_rows(
        url,
        "SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull::text,
                pg_get_expr(d.adbin, d.adrelid)
         FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
         WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
         UNION ALL
         SELECT 'index', c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid::text, i.indisprimary::text, NULL
         FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
         WHERE c.relnamespace = 'public'::regnamespace
         UNION ALL
         SELECT 'constraint', k.conname, k.conrelid::regclass::text, pg_get_constraintdef(k.oid), NULL, NULL
         FROM pg_constraint k WHERE k.connamespace = 'public'::regnamespace
         UNION ALL
         SELECT 'schema', nspname, NULL, NULL, NULL, NULL FROM pg_namespace WHERE nspname !~ '^pg_'",
    )
    .await;
    found.sort();
    found
}

/// 10,000 accounts that like, repost and follow each other. Counters and feed items are as the old workers
/// kept them: most of them right.
const FILL: &str = "
INSERT INTO users (did, handle) SELECT 'did:plc:u' || n, 'u' || n || '.test' FROM generate_series(0, 9999) n;
INSERT INTO posts (uri, cid, author_did, text, parent_uri, root_uri, created_at)
    SELECT 'at://did:plc:u' || n % 10000 || '/app.bsky.feed.post/p' || n, 'bafyp' || n, 'did:plc:u' || n % 10000,
           'post ' || n, parent, parent, timestamp '2026-01-01' + n * interval '1 second'
    FROM generate_series(0, 59999) n
    CROSS JOIN LATERAL (SELECT CASE WHEN n % 4 = 1 THEN
        'at://did:plc:u' || (n - 1) % 10000 || '/app.bsky.feed.post/p' || n - 1 END AS parent) p;
INSERT INTO likes (uri, user_did, post_uri, created_at)
    SELECT 'at://did:plc:u' || n % 10000 || '/app.bsky.feed.like/l' || n, 'did:plc:u' || n % 10000,
           'at://did:plc:u' || p % 10000 || '/app.bsky.feed.post/p' || p,
           timestamp '2026-02-01' + n * interval '1 second'
    FROM (SELECT n, (n * 7919 + n / 10000) % 60000 AS p FROM generate_series(0, 99999) n) s;
INSERT INTO reposts (uri, user_did, post_uri, created_at)
    SELECT 'at://did:plc:u' || n % 10000 || '/app.bsky.feed.repost/r' || n, 'did:plc:u' || n % 10000,
           'at://did:plc:u' || p % 10000 || '/app.bsky.feed.post/p' || p,
           timestamp '2026-02-01' + n * interval '1 second'
    FROM (SELECT n, (n * 7919 + n / 10000) % 60000 AS p FROM generate_series(0, 29999) n) s;
INSERT INTO follows (uri, follower_did, following_did, created_at)
    SELECT 'at://did:plc:u' || n % 10000 || '/app.bsky.graph.follow/f' || n, 'did:plc:u' || n % 10000,
           'did:plc:u' || (n * 31 + n / 10000 * 7 + 1) % 10000, timestamp '2026-02-01' + n * interval '1 second'
    FROM generate_series(0, 79999) n;
INSERT INTO quotes (uri, cid, post_uri, quoted_uri, created_at)
    SELECT uri, cid, uri, 'at://did:plc:u1/app.bsky.feed.post/p1', created_at FROM posts WHERE cid LIKE 'bafyp%00';
INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
    SELECT uri, uri, author_did, CASE WHEN parent_uri IS NULL THEN 'post' ELSE 'reply' END, created_at, cid, created_at
    FROM posts
    UNION ALL
    SELECT uri, post_uri, user_did, 'repost', created_at, 'bafy', created_at FROM reposts;
INSERT INTO post_aggregations (post_uri, like_count, repost_count, reply_count, quote_count)
    SELECT p.uri, coalesce(l.n, 0), coalesce(r.n, 0), coalesce(c.n, 0), coalesce(q.n, 0)
    FROM posts p
    LEFT JOIN (SELECT post_uri, count(*) AS n FROM likes GROUP BY 1) l ON l.post_uri = p.uri
    LEFT JOIN (SELECT post_uri, count(*) AS n FROM reposts GROUP BY 1) r ON r.post_uri = p.uri
    LEFT JOIN (SELECT parent_uri, count(*) AS n FROM posts GROUP BY 1) c ON c.parent_uri = p.uri
    LEFT JOIN (SELECT quoted_uri, count(*) AS n FROM quotes GROUP BY 1) q ON q.quoted_uri = p.uri;
-- What went wrong: likes counted twice, replies not counted, rows that were never made, two accounts of one handle.
UPDATE post_aggregations SET like_count = like_count + 1 WHERE post_uri LIKE '%77';
UPDATE post_aggregations SET reply_count = 0 WHERE post_uri LIKE '%84';
DELETE FROM post_aggregations WHERE post_uri LIKE '%99';
DELETE FROM feed_items WHERE uri LIKE '%55';
INSERT INTO quotes (uri, cid, post_uri, quoted_uri, created_at)
    SELECT 'at://did:plc:gone/app.bsky.feed.post/' || n, 'b', 'at://did:plc:gone/app.bsky.feed.post/' || n,
           'at://did:plc:u5/app.bsky.feed.post/p5', now() FROM generate_series(1, 3) n;
UPDATE users SET handle = 'u8.test' WHERE did = 'did:plc:u7';
";
