//! An account's public key, of either curve and in each of the forms in which DID documents carry it
//! (<https://atproto.com/specs/cryptography>).

use k256::ecdsa::signature::hazmat::PrehashVerifier as _;

/// The prefix of a compressed secp256k1 key in a multikey.
const K256_CODE: [u8; 2] = [0xe7, 0x01];
/// The prefix of a compressed P-256 key in a multikey.
const P256_CODE: [u8; 2] = [0x80, 0x24];

/// A public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// Of the curve secp256k1.
    K256(k256::ecdsa::VerifyingKey),
    /// Of the curve P-256.
    P256(p256::ecdsa::VerifyingKey),
}

/// Why a text is not a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// It is not in base 58 with the prefix `z`.
    #[error("the key is not in base 58 (multibase prefix z)")]
    Encoding,
    /// Another curve, or none.
    #[error("the key is of no curve that the protocol uses")]
    Curve,
    /// Not a point of its curve.
    #[error("the key is not a point of its curve")]
    Point,
}

impl Key {
    /// A multikey: curve and compressed point.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn from_multikey(text: &str) -> Result<Self, BadKey> {
        Self::from_bytes(&base58(text)?)
    }

    /// A `did:key`: a multikey behind that prefix.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn from_did_key(did: &str) -> Result<Self, BadKey> {
        Self::from_multikey(did.strip_prefix("did:key:").ok_or(BadKey::Encoding)?)
    }

    /// The key of a verification method: its type says whether the text names the curve.
    ///
    /// # Errors
    ///
    /// An unknown type, or a text that is not a key of it.
    pub fn from_method(method_type: &str, text: &str) -> Result<Self, BadKey> {
        match method_type {
            "Multikey" => Self::from_multikey(text),
            "EcdsaSecp256k1VerificationKey2019" => k256_point(&base58(text)?),
            "EcdsaSecp256r1VerificationKey2019" => p256_point(&base58(text)?),
            _ => Err(BadKey::Curve),
        }
    }

    /// The bytes of a multikey.
    ///
    /// # Errors
    ///
    /// They are something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadKey> {
        match bytes.split_at_checked(2) {
            Some((code, point)) if point.len() == 33 && code == K256_CODE => k256_point(point),
            Some((code, point)) if point.len() == 33 && code == P256_CODE => p256_point(point),
            _ => Err(BadKey::Curve),
        }
    }

    /// The bytes of its multikey.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::K256(key) => [&K256_CODE, key.to_sec1_point(true).as_bytes()].concat(),
            Self::P256(key) => [&P256_CODE, key.to_sec1_point(true).as_bytes()].concat(),
        }
    }

    /// Its multikey.
    #[must_use]
    pub fn to_multikey(&self) -> String {
        format!("z{}", bs58::encode(self.to_bytes()).into_string())
    }

    /// Whether `signature` is this key's over a message with this SHA-256. Of the two values that ECDSA allows for each
    /// signature the protocol allows only the lower one.
    #[must_use]
    pub fn verify_hash(&self, hash: &[u8; 32], signature: &[u8]) -> bool {
        match self {
            Self::K256(key) => k256::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| {
                signature.normalize_s() == signature && key.verify_prehash(hash, &signature).is_ok()
            }),
            Self::P256(key) => p256::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| {
                signature.normalize_s() == signature && key.verify_prehash(hash, &signature).is_ok()
            }),
        }
    }
}

fn base58(text: &str) -> Result<Vec<u8>, BadKey> {
    // The longest is an uncompressed point; more would only cost time.
    let text = text.strip_prefix('z').filter(|text| text.len() <= 100).ok_or(BadKey::Encoding)?;
    bs58::decode(text).into_vec().map_err(|_| BadKey::Encoding)
}

fn k256_point(bytes: &[u8]) -> Result<Key, BadKey> {
    k256::ecdsa::VerifyingKey::from_sec1_bytes(bytes).map(Key::K256).map_err(|_| BadKey::Point)
}

fn p256_point(bytes: &[u8]) -> Result<Key, BadKey> {
    p256::ecdsa::VerifyingKey::from_sec1_bytes(bytes).map(Key::P256).map_err(|_| BadKey::Point)
}
