//! The audit: compares counters, feed items, quotes and handles with the rows that they are derived from. It walks
//! table by table, a few thousand keys at a time: nobody waits for it, and more rows do not take more memory.

use std::fmt;
use std::time::{Duration, Instant};

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, IsolationLevel};

use super::StoreError;
use super::migrate::Say;
use super::verdict::Verdict;
use crate::out;

/// Keys checked with one statement.
const CHUNK: i64 = 1_000;
/// Keys repaired in one transaction: others wait for its locks.
const BATCH: usize = 100;
/// How often a transaction that lost to others is retried.
const TRIES: u32 = 20;
const EXAMPLES: usize = 5;
const SAY_EVERY: Duration = Duration::from_secs(5);

/// One rule that the tables must obey. Its statements are in `sql/audit`; each takes keys, `$1`.
struct Rule {
    name: &'static str,
    /// Where the keys to check come from.
    walks: &'static [Walk],
    /// Yields a row for every key that violates it: key, found, expected. It must see rows and what is derived from
    /// them in one statement.
    check: &'static str,
    /// Repairs keys, in one transaction: first takes the locks that make `standpipe.apply` wait, then repairs in a
    /// statement that sees everything committed before.
    repair: &'static [&'static str],
}

/// A column whose values are keys, in the order of its index.
struct Walk {
    table: &'static str,
    column: &'static str,
    /// Keys in one of these columns are skipped.
    unless: &'static [(&'static str, &'static str)],
}

const fn all(table: &'static str, column: &'static str) -> Walk {
    Walk { table, column, unless: &[] }
}

/// Columns that refer to posts. No post is checked twice, nor one that has counters.
const UNCOUNTED: [(&str, &str); 7] = [
    ("post_aggregations", "post_uri"),
    ("posts", "uri"),
    ("posts", "parent_uri"),
    ("likes", "post_uri"),
    ("reposts", "post_uri"),
    ("quotes", "quoted_uri"),
    ("bookmarks", "post_uri"),
];

/// The posts without counters from the column at this place.
const fn uncounted(place: usize) -> Walk {
    let (table, column) = UNCOUNTED[place];
    let (unless, _) = UNCOUNTED.split_at(place);
    Walk { table, column, unless }
}

const RULES: &[Rule] = &[
    // First the tables that others are counted from.
    Rule {
        name: "no record is left that was deleted later",
        walks: &[all("standpipe.tombstones", "uri")],
        check: include_str!("../../sql/audit/tombstones_check.sql"),
        repair: &[
            include_str!("../../sql/audit/tombstones_repair.sql"),
            // The apply function leaves the flush to its caller.
            "SELECT set_config('synchronous_commit', 'on', true) WHERE $1::text[] IS NOT NULL",
        ],
    },
    Rule {
        name: "every quote belongs to a live post",
        walks: &[all("quotes", "uri")],
        check: include_str!("../../sql/audit/quotes_check.sql"),
        repair: &[
            include_str!("../../sql/audit/partitions_lock.sql"),
            include_str!("../../sql/audit/quotes_lock.sql"),
            include_str!("../../sql/audit/quotes_lock_counters.sql"),
            include_str!("../../sql/audit/quotes_repair.sql"),
        ],
    },
    Rule {
        name: "counters agree with the rows",
        // First posts without counters: an event applied in the meantime starts their counters at zero.
        walks: &[
            uncounted(1),
            uncounted(2),
            uncounted(3),
            uncounted(4),
            uncounted(5),
            uncounted(6),
            all("post_aggregations", "post_uri"),
        ],
        check: include_str!("../../sql/audit/counters_check.sql"),
        repair: &[
            include_str!("../../sql/audit/counters_lock.sql"),
            include_str!("../../sql/audit/counters_repair.sql"),
        ],
    },
    Rule {
        name: "feed generators and labelers have their current like count",
        walks: &[all("feed_generators", "uri"), all("labeler_services", "uri")],
        check: include_str!("../../sql/audit/likes_check.sql"),
        repair: &[
            include_str!("../../sql/audit/counters_lock.sql"),
            include_str!("../../sql/audit/likes_repair_generators.sql"),
            include_str!("../../sql/audit/likes_repair_labelers.sql"),
        ],
    },
    Rule {
        name: "every live post and repost has its feed item, and nothing else does",
        walks: &[
            all("posts", "uri"),
            all("reposts", "uri"),
            Walk { table: "feed_items", column: "uri", unless: &[("posts", "uri"), ("reposts", "uri")] },
        ],
        check: include_str!("../../sql/audit/feed_items_check.sql"),
        repair: &[
            include_str!("../../sql/audit/partitions_lock.sql"),
            include_str!("../../sql/audit/repositories_lock.sql"),
            include_str!("../../sql/audit/feed_items_delete.sql"),
            include_str!("../../sql/audit/feed_items_insert.sql"),
        ],
    },
    Rule {
        name: "the flags of posts agree with the gates",
        walks: &[all("posts", "uri")],
        check: include_str!("../../sql/audit/flags_check.sql"),
        repair: &[
            include_str!("../../sql/audit/flags_lock.sql"),
            include_str!("../../sql/audit/flags_repair.sql"),
        ],
    },
    Rule {
        name: "every cause has its notifications",
        walks: &[all("likes", "uri"), all("reposts", "uri"), all("follows", "uri"), all("posts", "uri")],
        check: include_str!("../../sql/audit/notifications_check.sql"),
        repair: &[
            include_str!("../../sql/audit/partitions_lock.sql"),
            include_str!("../../sql/audit/repositories_lock.sql"),
            include_str!("../../sql/audit/notifications_repair.sql"),
        ],
    },
    Rule {
        name: "every notification has its cause",
        walks: &[all("notifications", "uri")],
        check: include_str!("../../sql/audit/causes_check.sql"),
        repair: &[
            include_str!("../../sql/audit/partitions_lock.sql"),
            include_str!("../../sql/audit/repositories_lock.sql"),
            include_str!("../../sql/audit/causes_repair.sql"),
        ],
    },
    Rule {
        name: "every account shows its most recently claimed handle",
        walks: &[all("standpipe.accounts", "did")],
        check: include_str!("../../sql/audit/claims_check.sql"),
        repair: &[
            include_str!("../../sql/audit/partitions_lock.sql"),
            include_str!("../../sql/audit/claims_lock.sql"),
            include_str!("../../sql/audit/claims_repair.sql"),
        ],
    },
    Rule {
        name: "no handle is shown by more than one account",
        walks: &[all("users", "handle")],
        check: include_str!("../../sql/audit/handles_check.sql"),
        repair: &[
            include_str!("../../sql/audit/handles_lock.sql"),
            include_str!("../../sql/audit/handles_repair.sql"),
        ],
    },
];

/// The result of one rule.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The rule.
    pub rule: &'static str,
    /// The number of violations.
    pub count: u64,
    /// The first few violations.
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

/// Checks every rule without stopping work. Changes nothing.
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn audit(client: &mut Client) -> Result<Vec<Finding>, StoreError> {
    audit_and_say(client, &mut |_| {}).await
}

/// Like [`audit`], with progress reports.
///
/// # Errors
///
/// As for [`audit`].
pub async fn audit_and_say(client: &mut Client, say: &mut Say<'_>) -> Result<Vec<Finding>, StoreError> {
    each_rule(client, false, say).await
}

/// Repairs what [`audit`] finds, without stopping work, and returns those findings. Work continues during the repair,
/// so check the result with [`audit`].
///
/// # Errors
///
/// The server cannot be reached or refuses.
pub async fn repair(client: &mut Client) -> Result<Vec<Finding>, StoreError> {
    repair_and_say(client, &mut |_| {}).await
}

/// Like [`repair`], with progress reports.
///
/// # Errors
///
/// As for [`repair`].
pub async fn repair_and_say(client: &mut Client, say: &mut Say<'_>) -> Result<Vec<Finding>, StoreError> {
    each_rule(client, true, say).await
}

async fn each_rule(client: &mut Client, repair: bool, say: &mut Say<'_>) -> Result<Vec<Finding>, StoreError> {
    // A thousand keys can take a while on a slow disk, and nobody is waiting.
    client.batch_execute("SET statement_timeout = 0").await?;
    let mut findings = Vec::with_capacity(RULES.len());
    for rule in RULES {
        match rule.look(client, repair, say).await {
            Ok(finding) => findings.push(finding),
            Err(error) => {
                // If this fails, the connection is broken, and the first error gives the reason.
                let _ = client.batch_execute("RESET statement_timeout").await;
                return Err(error);
            }
        }
    }
    client.batch_execute("RESET statement_timeout").await?;
    Ok(findings)
}

impl Rule {
    /// Walks over all keys.
    async fn look(
        &self,
        client: &mut Client,
        repair: bool,
        say: &mut Say<'_>,
    ) -> Result<Finding, StoreError> {
        let mut finding = Finding { rule: self.name, count: 0, examples: Vec::new() };
        let check = client.prepare(self.check).await?;
        let (mut looked_at, mut said) = (0_i64, Instant::now());
        for walk in self.walks {
            let page = client.prepare(&walk.page()).await?;
            let mut last = String::new();
            loop {
                let row = client.query_one(&page, &[&last, &CHUNK]).await?;
                let (end, keys): (Option<String>, Vec<String>) = (row.get(0), row.get(1));
                let Some(end) = end else { break };
                last = end;
                looked_at += row.get::<_, i64>(2);
                if !keys.is_empty() {
                    let suspects = violations(client, &check, &keys).await?;
                    self.judge(client, &check, suspects, repair, &mut finding).await?;
                }
                if said.elapsed() > SAY_EVERY {
                    // Estimated afresh each time: tables grow, and statistics may be collected in the meantime.
                    let about = self.rows(client).await?;
                    say(&format!("  {}: {}", self.name, progress(looked_at, about)));
                    said = Instant::now();
                }
            }
        }
        Ok(finding)
    }

    /// The planner's estimate of the number of rows: rows per page, as counted by the last vacuum or analyze, times the
    /// current number of pages. `None` if a table was never counted.
    async fn rows(&self, client: &Client) -> Result<Option<f64>, StoreError> {
        let tables: Vec<&str> = self.walks.iter().map(|walk| walk.table).collect();
        let rows = client.query_one(include_str!("../../sql/store/estimated_rows.sql"), &[&tables]).await?;
        Ok(rows.get(0))
    }

    async fn judge(
        &self,
        client: &mut Client,
        check: &tokio_postgres::Statement,
        suspects: Vec<Violation>,
        repair: bool,
        finding: &mut Finding,
    ) -> Result<(), StoreError> {
        if suspects.is_empty() {
            return Ok(());
        }
        let keys: Vec<String> = suspects.into_iter().map(|suspect| suspect.key).collect();
        // A worker that changes rows and counters one after the other may have been caught between the two.
        let violations = violations(client, check, &keys).await?;
        finding.count += violations.len() as u64;
        let room = EXAMPLES - finding.examples.len();
        finding.examples.extend(violations.iter().take(room).map(ToString::to_string));
        if repair {
            let keys: Vec<&str> = violations.iter().map(|violation| violation.key.as_str()).collect();
            for batch in keys.chunks(BATCH) {
                self.put_right(client, batch).await?;
            }
        }
        Ok(())
    }

    async fn put_right(&self, client: &mut Client, keys: &[&str]) -> Result<(), StoreError> {
        let mut tries = 0;
        loop {
            match self.try_to_put_right(client, keys).await {
                Err(error) if error.verdict == Verdict::Retry && tries < TRIES => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(10..200))).await;
                }
                done => return done,
            }
        }
    }

    async fn try_to_put_right(&self, client: &mut Client, keys: &[&str]) -> Result<(), StoreError> {
        // Every statement must see what was committed before it began, whatever the database's default is.
        let transaction =
            client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
        for sql in self.repair {
            let keys: &(dyn ToSql + Sync) = &keys;
            transaction.query(*sql, &[keys]).await?;
        }
        Ok(transaction.commit().await?)
    }
}

/// A walk's progress. An estimate that it has already passed is not shown.
fn progress(looked_at: i64, about: Option<f64>) -> String {
    match about {
        Some(about) if about > looked_at as f64 => {
            let share = (looked_at as f64 / about * 100.0).min(99.0);
            format!("{looked_at} of about {about:.0} rows ({share:.0} %)")
        }
        _ => format!("{looked_at} rows so far"),
    }
}

impl Walk {
    /// The next `$2` keys after `$1`: the last of them, those to check, and the number of rows.
    fn page(&self) -> String {
        let Self { table, column, unless } = self;
        // Separate conditions: for conditions joined by OR, the planner scans whole tables.
        let new: Vec<String> = unless
            .iter()
            .map(|(table, column)| format!("NOT EXISTS (SELECT FROM {table} e WHERE e.{column} = page.key)"))
            .collect();
        let new = if new.is_empty() { "true".to_owned() } else { new.join(" AND ") };
        format!(
            "WITH page AS MATERIALIZED (
                 SELECT {column} AS key FROM {table} WHERE {column} > $1 ORDER BY {column} LIMIT $2
             )
             SELECT max(key)::text, ARRAY(SELECT DISTINCT key::text FROM page WHERE {new}), count(*) FROM page"
        )
    }
}

/// A key that breaks a rule.
struct Violation {
    key: String,
    found: Option<String>,
    expected: Option<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Keys and values come from the network.
        let text = |value: &Option<String>| {
            value.as_ref().map_or_else(|| "nothing".to_owned(), |value| out::safe(value, out::CELL))
        };
        let (key, found, expected) =
            (out::safe(&self.key, out::LINE), text(&self.found), text(&self.expected));
        write!(f, "{key}: {found}, should be {expected}")
    }
}

async fn violations(
    client: &Client,
    check: &tokio_postgres::Statement,
    keys: &[String],
) -> Result<Vec<Violation>, StoreError> {
    let rows = client.query(check, &[&keys]).await?;
    Ok(rows
        .iter()
        .map(|row| Violation { key: row.get(0), found: row.get(1), expected: row.get(2) })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_exceeds_its_estimate() {
        assert_eq!(progress(1_000, Some(4_000.0)), "1000 of about 4000 rows (25 %)");
        assert_eq!(progress(3_999, Some(4_000.0)), "3999 of about 4000 rows (99 %)");
        assert_eq!(progress(4_000, Some(4_000.0)), "4000 rows so far");
        assert_eq!(progress(180_582, Some(114_978.0)), "180582 rows so far");
        assert_eq!(progress(5, None), "5 rows so far");
    }

    #[test]
    fn an_example_is_bounded_and_escaped() {
        let violation = Violation {
            key: format!("at://did:plc:a\u{1b}[2J/{}", "x".repeat(900_000)),
            found: Some("\u{202e}".to_owned()),
            expected: None,
        };
        let text = violation.to_string();
        assert!(text.starts_with("at://did:plc:a\\u{1b}[2J/xxx"), "{text}");
        assert!(text.ends_with("...: \\u{202e}, should be nothing") && text.len() < 400, "{text}");
    }
}
