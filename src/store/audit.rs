//! Recounting: what the counters, feed items and quotes say against what the rows say.

use std::fmt;

use tokio_postgres::Client;

use super::StoreError;

/// One rule that the tables must obey.
struct Rule {
    name: &'static str,
    /// Yields one row for every violation: what, found, expected.
    find: &'static str,
    /// Puts it right.
    repair: &'static str,
}

/// What the counters have to be, from the rows.
const COUNTS: &str = "
    SELECT post_uri, sum(likes)::int AS like_count, sum(reposts)::int AS repost_count, sum(replies)::int AS reply_count,
           sum(quotes)::int AS quote_count, sum(bookmarks)::int AS bookmark_count
    FROM (
        SELECT post_uri, count(DISTINCT user_did) AS likes, 0 AS reposts, 0 AS replies, 0 AS quotes, 0 AS bookmarks
        FROM likes GROUP BY post_uri
        UNION ALL
        SELECT post_uri, 0, count(DISTINCT user_did), 0, 0, 0 FROM reposts GROUP BY post_uri
        UNION ALL
        SELECT parent_uri, 0, 0, count(*), 0, 0 FROM posts WHERE parent_uri IS NOT NULL GROUP BY parent_uri
        UNION ALL
        SELECT quoted_uri, 0, 0, 0, count(DISTINCT post_uri), 0 FROM quotes GROUP BY quoted_uri
        UNION ALL
        SELECT post_uri, 0, 0, 0, 0, count(DISTINCT user_did) FROM bookmarks GROUP BY post_uri
        UNION ALL
        SELECT uri, 0, 0, 0, 0, 0 FROM posts
    ) c GROUP BY post_uri";

const RULES: &[Rule] = &[
    // First what others are counted from.
    Rule {
        name: "every quote belongs to a live post",
        find: "SELECT q.uri, q.quoted_uri, 'none' FROM quotes q
            WHERE NOT EXISTS (SELECT FROM posts p WHERE p.uri = q.post_uri)",
        repair: "DELETE FROM quotes q WHERE NOT EXISTS (SELECT FROM posts p WHERE p.uri = q.post_uri)",
    },
    Rule {
        name: "counters agree with the rows",
        find: "WITH expected AS ({COUNTS})
            SELECT coalesce(e.post_uri, a.post_uri),
                   row(a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)::text,
                   row(coalesce(e.like_count, 0), coalesce(e.repost_count, 0), coalesce(e.reply_count, 0),
                       coalesce(e.quote_count, 0), coalesce(e.bookmark_count, 0))::text
            FROM expected e FULL JOIN post_aggregations a ON a.post_uri = e.post_uri
            WHERE a.post_uri IS NULL
               OR (a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)
                  IS DISTINCT FROM (coalesce(e.like_count, 0), coalesce(e.repost_count, 0),
                                    coalesce(e.reply_count, 0), coalesce(e.quote_count, 0),
                                    coalesce(e.bookmark_count, 0))",
        repair: "WITH expected AS ({COUNTS}), reset AS (
                UPDATE post_aggregations a
                SET like_count = 0, repost_count = 0, reply_count = 0, quote_count = 0, bookmark_count = 0
                WHERE NOT EXISTS (SELECT FROM expected e WHERE e.post_uri = a.post_uri)
                  AND (like_count, repost_count, reply_count, quote_count, bookmark_count) <> (0, 0, 0, 0, 0)
            )
            INSERT INTO post_aggregations AS a
                (post_uri, like_count, repost_count, reply_count, quote_count, bookmark_count)
            SELECT post_uri, like_count, repost_count, reply_count, quote_count, bookmark_count
            FROM expected ORDER BY post_uri COLLATE \"C\"
            ON CONFLICT (post_uri) DO UPDATE SET
                like_count = excluded.like_count, repost_count = excluded.repost_count,
                reply_count = excluded.reply_count, quote_count = excluded.quote_count,
                bookmark_count = excluded.bookmark_count, updated_at = now()
            WHERE (a.like_count, a.repost_count, a.reply_count, a.quote_count, a.bookmark_count)
                <> (excluded.like_count, excluded.repost_count, excluded.reply_count, excluded.quote_count,
                    excluded.bookmark_count)",
    },
    Rule {
        name: "every live post and repost has its feed item, and nothing else has",
        find: "SELECT coalesce(f.uri, r.uri), coalesce(f.type, 'none'), coalesce(r.type, 'none')
            FROM feed_items f FULL JOIN (
                SELECT uri, CASE WHEN parent_uri IS NULL THEN 'post' ELSE 'reply' END AS type FROM posts
                UNION ALL SELECT uri, 'repost' FROM reposts
            ) r ON r.uri = f.uri
            WHERE f.type IS DISTINCT FROM r.type",
        repair: "WITH gone AS (
                DELETE FROM feed_items f
                WHERE NOT EXISTS (SELECT FROM posts p WHERE p.uri = f.uri)
                  AND NOT EXISTS (SELECT FROM reposts r WHERE r.uri = f.uri)
            )
            INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
            SELECT uri, uri, author_did, CASE WHEN parent_uri IS NULL THEN 'post' ELSE 'reply' END,
                   least(created_at, standpipe.committed_at(commit_rev, stream_ms, indexed_at)), cid, created_at
            FROM posts
            UNION ALL
            -- A repost's row does not keep the repost's own CID.
            SELECT uri, post_uri, user_did, 'repost',
                   least(created_at, standpipe.committed_at(commit_rev, stream_ms, indexed_at)), '', created_at
            FROM reposts
            ON CONFLICT (uri) DO UPDATE SET type = excluded.type WHERE feed_items.type <> excluded.type",
    },
    Rule {
        name: "no record lives that was deleted later",
        find: "SELECT r.uri, 'a row', 'none' FROM standpipe.tombstones t JOIN ({ROWS}) r ON r.uri = t.uri
            WHERE standpipe.newer(t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq,
                                  r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq)",
        repair: "",
    },
    Rule {
        name: "a handle is shown by one account at most",
        find: "SELECT handle, count(*)::text || ' accounts', '1' FROM users
            WHERE handle <> 'handle.invalid' GROUP BY handle HAVING count(*) > 1",
        repair: "",
    },
];

/// Every row that a tombstone can kill.
const ROWS: &str = "
    SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM posts
    UNION ALL SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM likes
    UNION ALL SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM reposts
    UNION ALL SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM bookmarks
    UNION ALL SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM follows
    UNION ALL SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM blocks
    UNION ALL SELECT uri, commit_rev, commit_seq, stream_ms, stream_seq FROM generic_records";

/// What one rule found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The rule.
    pub rule: &'static str,
    /// How many violations.
    pub count: u64,
    /// The first few: what, found, expected.
    pub examples: Vec<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.count == 0 { "ok".to_owned() } else { format!("{} differ", self.count) };
        write!(f, "{state:>12}  {}", self.rule)?;
        for example in &self.examples {
            write!(f, "\n              {example}")?;
        }
        Ok(())
    }
}

/// Checks every rule in one snapshot. Changes nothing.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn audit(client: &mut Client) -> Result<Vec<Finding>, StoreError> {
    let transaction = client
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    whole_tables(&transaction).await?;
    let mut findings = Vec::with_capacity(RULES.len());
    for rule in RULES {
        let sql = expand(rule.find);
        let sql = format!(
            "WITH v (what, found, expected) AS ({sql})
             SELECT (SELECT count(*) FROM v), what, found, expected FROM v LIMIT 5"
        );
        let rows = transaction.query(&sql, &[]).await?;
        let text = |row: &tokio_postgres::Row, column| {
            row.get::<_, Option<String>>(column).unwrap_or_else(|| "nothing".to_owned())
        };
        findings.push(Finding {
            rule: rule.name,
            count: rows.first().map_or(0, |row| u64::try_from(row.get::<_, i64>(0)).unwrap_or(0)),
            examples: rows
                .iter()
                .map(|row| format!("{}: {}, should be {}", text(row, 1), text(row, 2), text(row, 3)))
                .collect(),
        });
    }
    transaction.commit().await?;
    Ok(findings)
}

/// Puts right what [`audit`] counts, rule by rule. Writers wait meanwhile: the counters cannot be set while others move
/// them.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn repair(client: &mut Client) -> Result<(), StoreError> {
    let transaction = client.transaction().await?;
    whole_tables(&transaction).await?;
    transaction
        .batch_execute("LOCK TABLE post_aggregations, feed_items, quotes IN SHARE ROW EXCLUSIVE MODE")
        .await?;
    for rule in RULES.iter().filter(|rule| !rule.repair.is_empty()) {
        transaction.batch_execute(&expand(rule.repair)).await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// These connections are set up for access by key; here every row is read.
async fn whole_tables(transaction: &tokio_postgres::Transaction<'_>) -> Result<(), StoreError> {
    transaction
        .batch_execute(
            "SET LOCAL enable_seqscan = on; SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on;
             SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0",
        )
        .await?;
    Ok(())
}

fn expand(sql: &str) -> String {
    sql.replace("{COUNTS}", COUNTS).replace("{ROWS}", ROWS)
}
