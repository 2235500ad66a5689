//! What operators ask a router. They prove themselves with the header [`AUTHORIZATION`]. The answer is a
//! [`StatusReply`](super::StatusReply), a refusal an [`ErrorResponse`](super::ErrorResponse).

use super::{Decision, ErrorBody};
use crate::status::BreakerStatus;
use serde::{Deserialize, Serialize};

/// `Bearer ` and a token of `beamline operator-token`.
pub const AUTHORIZATION: &str = "authorization";

/// The data of the reply on [`crate::subjects::ADMIN_BREAKERS`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Breakers {
    pub breakers: Vec<BreakerStatus>,
}

/// The data of the reply on [`crate::subjects::ADMIN_EXTENSIONS`]: there are no extensions yet.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ExtensionsHealth {
    pub extensions: [(); 0],
}

/// The data of the reply on [`crate::subjects::ADMIN_DRY_RUN`], whose request is a decide request: what the router would
/// answer now. Nothing is counted, stored or pushed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DryRun {
    /// Exactly one of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// What [`crate::subjects::ADMIN_COMPLEXITY`] asks about. The policy that serves this tenant may be that of another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PolicyQuery {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_id: Option<String>,
}

/// The data of the reply on [`crate::subjects::ADMIN_COMPLEXITY`]: how much of its limits a policy uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Complexity {
    /// The tenant that owns the policy which serves.
    pub policy_tenant: String,
    pub policy_id: String,
    pub policy_version: String,
    pub providers: u64,
    pub rules: u64,
    pub rules_max: u64,
    /// Steps that all conditions take for one request at most, without loops and long texts.
    pub condition_steps: u64,
    pub condition_steps_max: u64,
    /// There are none yet.
    pub extensions: u64,
}
