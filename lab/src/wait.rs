//! Waiting for a condition, in tests.

use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);

/// Waits until `condition` is true, looking every 20 ms.
///
/// # Panics
/// At the deadline, with `what`.
pub async fn wait_until(what: &str, deadline: Duration, mut condition: impl AsyncFnMut() -> bool) {
    wait_for(what, deadline, async || if condition().await { Ok(()) } else { Err("not so") }).await;
}

/// Waits until `look` returns a value, looking every 20 ms, and returns it.
///
/// # Panics
/// At the deadline, with `what` and the last reason why not. A look that hangs is cut off at the
/// deadline as well.
pub async fn wait_for<T, E: std::fmt::Display>(
    what: &str,
    deadline: Duration,
    mut look: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let started = Instant::now();
    let mut looks = 0;
    let mut last = String::from("the first look has not ended");
    loop {
        let left = deadline.saturating_sub(started.elapsed());
        match tokio::time::timeout(left, look()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(reason)) => last = reason.to_string(),
            // The condition was looked at before; what it said then tells more.
            Err(_) if looks > 0 => {}
            Err(_) => last = String::from("the look did not end"),
        }
        looks += 1;
        let elapsed = started.elapsed();
        assert!(
            elapsed < deadline,
            "waited {elapsed:.1?} in vain for: {what}; looked {looks} times, at last: {last}"
        );
        tokio::time::sleep(POLL).await;
    }
}
