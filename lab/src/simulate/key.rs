//! The accounts' signing keys: they follow from the seed, the account's number, and how often it has changed its key.

#![expect(
    clippy::expect_used,
    reason = "every number below the order is a key, and every hash of 32 bytes can be signed"
)]

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use k256::ecdsa::signature::hazmat::PrehashSigner as _;

use super::accounts::mix;

/// One in so many accounts has a key of the rarer curve.
const RARER: u32 = 16;

/// A signing key.
pub(super) enum Key {
    K256(k256::ecdsa::SigningKey),
    P256(p256::ecdsa::SigningKey),
}

impl Key {
    /// The key of an account after `changes` changes.
    pub(super) fn of(seed: u64, account: u32, changes: u32) -> Self {
        // Never zero, and below the order of both curves.
        let mut secret = [1; 32];
        let mut number = mix(mix(seed) ^ (u64::from(account) << 32 | u64::from(changes)));
        for part in secret[8..].chunks_exact_mut(8) {
            number = mix(number);
            part.copy_from_slice(&number.to_be_bytes());
        }
        if account % RARER == RARER - 1 {
            Self::P256(p256::ecdsa::SigningKey::from_slice(&secret).expect("a number below the order"))
        } else {
            Self::K256(k256::ecdsa::SigningKey::from_slice(&secret).expect("a number below the order"))
        }
    }

    /// The signature of a SHA-256 hash; its `s` is the lower one, as the protocol requires.
    pub(super) fn sign(&self, hash: &[u8]) -> [u8; 64] {
        match self {
            Self::K256(key) => {
                let signature: k256::ecdsa::Signature = key.sign_prehash(hash).expect("a hash of 32 bytes");
                signature.normalize_s().to_bytes().into()
            }
            Self::P256(key) => {
                let signature: p256::ecdsa::Signature = key.sign_prehash(hash).expect("a hash of 32 bytes");
                signature.normalize_s().to_bytes().into()
            }
        }
    }

    /// As it stands in the account's document.
    pub(super) fn multikey(&self) -> String {
        match self {
            Self::K256(key) => standpipe::verify::Key::K256(*key.verifying_key()),
            Self::P256(key) => standpipe::verify::Key::P256(*key.verifying_key()),
        }
        .to_multikey()
    }
}

/// How often each account has changed its key, as far as any connection has come.
#[derive(Debug, Default)]
pub(super) struct Published(Mutex<HashMap<u32, u32>>);

impl Published {
    pub(super) fn changes(&self, account: u32) -> u32 {
        let published = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        published.get(&account).copied().unwrap_or(0)
    }

    /// Whether the account is on the second server by now: every second change of its key is a move.
    pub(super) fn has_moved(&self, account: u32) -> bool {
        self.changes(account) / 2 % 2 == 1
    }

    pub(super) fn changed(&self, account: u32, changes: u32) {
        let mut published = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = published.entry(account).or_default();
        *known = changes.max(*known);
    }
}
