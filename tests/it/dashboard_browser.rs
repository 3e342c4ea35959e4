//! The dashboard in a real browser: what it shows in every state, what its buttons do, and the screenshots in
//! `docs/images`.
//!
//! `make test-ui` runs it; it needs Chromium. `UI_WARM_UP=600` lets the charts fill before the first
//! screenshot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::browser::{Browser, View};
use crate::support::chain::{Program, SOON, STREAM, Variables, look, redis_command, serve};
use crate::support::{Postgres, Redis, execute, query_value, wait_until};
use serde_json::json;
use standpipe_lab::simulate::{NetworkOptions, Source};

const TOKEN: &str = "a-token-that-nobody-guesses";
const WIDE: View = View { width: 1280, dark: false };

fn picture(name: &str) -> PathBuf {
    let folder = std::env::var("UI_PICTURES").map_or_else(
        |_| Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/images"),
        |folder| PathBuf::from(&folder),
    );
    folder.join(name).with_extension("png")
}

/// Appends a commit of one operation, as the reader writes it.
async fn push(redis: &Redis, repo: &str, path: &str, record: &serde_json::Value) {
    let op = json!({"action": "create", "path": path, "cid": "bafy", "record": record});
    let data = json!({"repo": repo, "rev": "3n2samfdihk2n", "ops": [op]}).to_string();
    let words = ["XADD", STREAM, "*", "type", "commit", "data", &data, "seq", ""];
    let _: String = redis_command(redis, &words).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Chromium; make test-ui runs it"]
async fn the_page_shows_every_state_and_its_buttons_work() {
    let mut postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let redis = Redis::start().await;
    let network = NetworkOptions { seed: 5, ..NetworkOptions::default() };
    let (relay_url, _relay) = serve(Source::Network(network), Some(1_200)).await;
    let variables = Variables::new()
        .with("RELAY_URL", relay_url)
        .with("REDIS_URL", redis.url())
        .with("DATABASE_URL", &database)
        .with("ADMIN_TOKEN", TOKEN)
        .with("CONSUMER_ID", "worker");
    let program = Program::start("run", &variables).await;
    program.finishes_more(2_000.0).await;
    let warm_up = std::env::var("UI_WARM_UP").map_or(20, |seconds| seconds.parse().unwrap());
    tokio::time::sleep(Duration::from_secs(warm_up)).await;

    let mut page = Browser::start().await;
    page.view(WIDE).await;
    page.open(&format!("http://{}/", program.http)).await;

    // Healthy, under load.
    page.until(
        "the page to say that it is well",
        "document.getElementById('health').dataset.level === 'well'",
    )
    .await;
    assert!(page.text("#sentence").await.contains("events/s"));
    page.screenshot(&picture("healthy")).await;
    page.screenshot_of_window(&picture("overview")).await;
    page.view(View { dark: true, ..WIDE }).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    page.screenshot(&picture("dark")).await;
    page.view(View { width: 390, dark: false }).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    page.screenshot(&picture("narrow")).await;
    let width = page.evaluate("document.documentElement.scrollWidth").await;
    assert_eq!(width, json!(390), "the narrow page is wider than its window");
    page.view(WIDE).await;

    // Thousands of events cost the browser one update a second, and a hidden tab nothing.
    page.call("Performance.enable", json!({})).await;
    let before = page.busy_seconds().await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let busy = page.busy_seconds().await - before;
    println!("the page was busy for {busy:.2} of 10 s");
    assert!(busy < 2.0, "the page was busy for {busy:.2} of 10 s");
    let hide = |hidden: bool| {
        format!(
            "Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}});
             document.dispatchEvent(new Event('visibilitychange'))"
        )
    };
    page.evaluate(&hide(true)).await;
    page.until("the connection to be closed", "source === null").await;
    page.evaluate(&hide(false)).await;
    page.until("the connection to be back", "source?.readyState === EventSource.OPEN").await;

    // The keyboard moves through a chart.
    page.evaluate("document.querySelector('.chart').focus()").await;
    page.press("ArrowLeft").await;
    page.until(
        "the chart to tell of a moment",
        "document.querySelector('.chart h2').innerText.includes('at ')",
    )
    .await;
    page.press("Escape").await;
    page.evaluate("document.activeElement.blur()").await;

    // The day, and the cost of PostgreSQL's statements: both are fetched only when opened.
    page.click("[data-range='86400']").await;
    page.until("the minutes of the day", "day.length > 0 && span <= 86400").await;
    assert!(page.text("#times-lead").await.starts_with("the last 24 hours"));
    page.click("[data-range='600']").await;
    page.click("#st-fold > summary").await;
    page.until(
        "PostgreSQL's answer",
        "document.getElementById('st-why').innerText.includes('does not track them')",
    )
    .await;
    page.click("#st-fold > summary").await;

    // On a phone only the essentials are unfolded; a link opens the other parts.
    page.view(View { width: 390, dark: false }).await;
    page.open(&format!("http://{}/?narrow", program.http)).await;
    assert_eq!(page.evaluate("document.getElementById('times').open").await, json!(false));
    let height = page.evaluate("document.documentElement.scrollHeight").await.as_f64().unwrap();
    assert!(height < 2_200.0, "{height} px are too many for a telephone");
    page.evaluate("document.querySelector('.nav a[href=\"#c-fold\"]').click()").await;
    page.until("the part to unfold", "document.getElementById('c-fold').open").await;
    page.view(WIDE).await;
    page.open(&format!("http://{}/", program.http)).await;

    // Dead letters: one that can be fixed, and others.
    push(&redis, "did:plc:a", "app.bsky.actor.profile/self", &json!({"displayName": "x".repeat(300)})).await;
    push(&redis, "did:plc:b", "app.bsky.feed.like/3kabc", &json!({"createdAt": "2026-01-01T00:00:00Z"}))
        .await;
    push(&redis, "did:plc:c", "app.bsky.graph.follow/3kabd", &json!({"subject": 7})).await;
    page.until("the dead letters to be listed", "document.querySelectorAll('#letters tr').length === 3")
        .await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    page.screenshot(&picture("dead-letters")).await;
    // The filter applies to the list and to the buttons below it.
    page.evaluate("document.getElementById('dl-text').focus()").await;
    page.write("GRAPH.follow").await;
    page.until("the list to be filtered", "document.querySelectorAll('#letters tr').length === 1").await;
    assert_eq!(page.text("#dl-purge").await, "Purge these");
    assert_eq!(page.text("#dl-looked").await, "Looked through 3 of 3.");
    page.click("#dl-clear").await;
    page.until("the list to be whole", "document.querySelectorAll('#letters tr').length === 3").await;
    assert_eq!(page.text("#dl-purge").await, "Purge all");
    execute(&database, "ALTER TABLE users ALTER display_name TYPE text").await;

    // Retry: nothing happens without the token or with a wrong one; with the right one the letter is applied.
    let mark =
        "[...document.querySelectorAll('#letters tr')].find(row => row.innerText.includes('actor.profile'))
                .querySelector('button').id = 'mendable'";
    page.evaluate(mark).await;
    page.click("#mendable").await;
    page.until("the letter to open", "document.getElementById('letter-dialog').open").await;
    assert_eq!(page.text("#letter-uri").await, "at://did:plc:a/app.bsky.actor.profile/self");
    page.screenshot_of_window(&picture("dead-letter")).await;
    page.click("#letter-retry").await;
    page.until("the token to be asked for", "document.getElementById('token-dialog').open").await;
    page.click("#token-cancel").await;
    assert_eq!(look(&redis).await.unwrap().dead_letters, 3);
    page.click("#letter-retry").await;
    page.write("not-the-token-at-all").await;
    page.press("Enter").await;
    page.until(
        "the wrong token to be refused",
        "document.getElementById('token-error').textContent.includes('not the admin token')",
    )
    .await;
    assert_eq!(look(&redis).await.unwrap().dead_letters, 3);
    page.screenshot_of_window(&picture("token")).await;
    page.write(TOKEN).await;
    page.press("Enter").await;
    wait_until("the dead letter to be applied", SOON, async || look(&redis).await.unwrap().dead_letters == 2)
        .await;
    let name = "SELECT length(display_name) FROM users WHERE did = 'did:plc:a'";
    assert_eq!(query_value(&database, name).await, "300");
    page.until("the list to be shorter", "document.querySelectorAll('#letters tr').length === 2").await;

    // Pause and resume.
    page.click("#c-all").await;
    page.until(
        "the page to say that it is paused",
        "document.getElementById('health').dataset.level === 'paused'",
    )
    .await;
    assert!(page.text("#sentence").await.starts_with("Paused by an operator"));
    tokio::time::sleep(Duration::from_secs(12)).await;
    page.screenshot(&picture("paused")).await;
    page.click("#resume-now").await;
    page.until(
        "the page to say that it is at work",
        "['well', 'busy'].includes(document.getElementById('health').dataset.level)",
    )
    .await;
    program.finishes_more(1_000.0).await;

    // The database goes down and comes back.
    postgres.sigkill().await.unwrap();
    page.until(
        "the page to miss the database",
        "document.getElementById('sentence').innerText.includes('Waiting for PostgreSQL')",
    )
    .await;
    tokio::time::sleep(Duration::from_secs(14)).await;
    page.screenshot(&picture("database-away")).await;
    postgres.start_again().await.unwrap();
    page.until(
        "the page to say that it goes on",
        "['well', 'busy'].includes(document.getElementById('health').dataset.level)",
    )
    .await;

    // The token is stored nowhere.
    let everything = page.evaluate("document.documentElement.outerHTML + JSON.stringify([localStorage, sessionStorage, document.cookie])").await;
    assert!(!everything.as_str().unwrap().contains(TOKEN));
    assert!(!program.output().contains(TOKEN));

    // Drain from the page, after a confirmation.
    let mut program = program;
    page.click("#c-drain").await;
    page.until("the question", "document.getElementById('sure-dialog').open").await;
    page.click("#sure-yes").await;
    assert_eq!(program.wait_exit(SOON).await, 0);
    page.until(
        "the page to tell the end",
        "document.getElementById('sentence').innerText === 'Drained and exited.'",
    )
    .await;
    assert!(page.complaints.is_empty(), "{:#?}", page.complaints);
}
