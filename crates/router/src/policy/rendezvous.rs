//! Weighted rendezvous hashing: each key ranks the candidates on its own, so a candidate that leaves moves only its own
//! keys.
//!
//! Source: Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005 (logarithmic method).

/// The candidate with the highest score for `key`; `None` if there is none.
pub fn highest<'a, T>(
    candidates: impl Iterator<Item = &'a T>,
    name_and_weight: impl Fn(&T) -> (&str, f64),
    key: &[&str],
) -> Option<&'a T> {
    let seed = key
        .iter()
        .fold(FNV_OFFSET, |hash, part| fnv(fnv(hash, part.as_bytes()), &[0xff]));

    let score = |candidate: &T| {
        let (name, weight) = name_and_weight(candidate);
        let hash = mix(fnv(seed, name.as_bytes()));
        // 53 bits as a number in (0, 1), whose logarithm is negative and finite.
        let unit = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        -weight / unit.ln()
    };

    candidates
        .map(|candidate| (score(candidate), candidate))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, c)| c)
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(mut hash: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash
}

/// The finalizer of MurmurHash3: FNV's high bits change little with the last bytes, and this spreads the change.
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn candidate_that_leaves_moves_only_its_own_keys(keys in proptest::collection::vec("[a-z]{1,8}", 50), gone in 0_usize..4) {
            let all = [("a", 10.0), ("b", 20.0), ("c", 30.0), ("d", 40.0)];
            for key in &keys {
                let before = highest(all.iter(), |c| (c.0, c.1), &[key]).unwrap();
                let after = highest(all.iter().filter(|c| c.0 != all[gone].0), |c| (c.0, c.1), &[key]).unwrap();
                if before.0 != all[gone].0 {
                    prop_assert_eq!(before, after);
                }
            }
        }
    }
}
