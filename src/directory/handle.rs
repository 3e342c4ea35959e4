//! Handles: the document claims one, and the handle's own answer at `/.well-known/atproto-did` confirms it
//! (<https://atproto.com/specs/handle#handle-resolution>).

use super::http::HttpError;
use super::{Directory, LookupError, TIME_LIMIT, host_of};

/// The largest answer that is read: a DID, and what may stand around it.
const MAX_ANSWER: usize = 4096;

impl Directory {
    /// The handle of `did`; `None` if it claims none, or one that does not confirm it.
    ///
    /// # Errors
    ///
    /// [`LookupError`].
    pub async fn handle(&self, did: &str) -> Result<Option<String>, LookupError> {
        let document = self.recent_document(did).await?;
        let Some(handle) = document.handle.map(|handle| handle.to_ascii_lowercase()) else { return Ok(None) };
        // Names for development exist in no public directory: the account's server answers for them.
        let server = document.server.filter(|_| self.private && handle.rsplit('.').next() == Some("test"));
        let url = match server {
            Some(server) => format!("{}/.well-known/atproto-did", server.trim_end_matches('/')),
            None => format!("https://{handle}/.well-known/atproto-did"),
        };
        let host = host_of(&url);
        self.wait_is_over(&host)?;
        let Ok(_slot) = self.slots.acquire().await else {
            return Err(LookupError::Away("the program is stopping".to_owned()));
        };
        let asked = tokio::time::timeout(TIME_LIMIT, self.http.get_as(&url, Some(&handle), MAX_ANSWER)).await;
        let answer = match asked {
            Ok(Ok(answer)) => answer,
            Ok(Err(HttpError::Refused(_))) => return Ok(None),
            Ok(Err(HttpError::Failed(reason) | HttpError::Slow(reason))) => {
                return Err(LookupError::Away(format!("{host}: {reason}")));
            }
            Err(_) => return Err(LookupError::Away(format!("{host}: no answer within {TIME_LIMIT:?}"))),
        };
        match answer.status {
            200 => Ok((answer.body.trim_ascii() == did.as_bytes()).then_some(handle)),
            status @ (429 | 500..) => {
                if matches!(status, 429 | 503) {
                    self.close(&host, &answer);
                }
                Err(LookupError::Away(format!("{host}: HTTP {}", answer.status)))
            }
            _ => Ok(None),
        }
    }
}
