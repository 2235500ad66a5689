//! Conditions of rules: CEL expressions, and the legacy JSON form with the same meaning. A condition that names an
//! undefined variable is false.

mod eval;
mod meter;
mod pattern;

use cel::common::ast::{EntryExpr, Expr, IdedExpr, LiteralValue, SelectExpr};
use cel::{ExecutionError, Program, Value as Cel};
use eval::{Evaluation, Val};
use meter::Meter;
pub use meter::Stop;
use pattern::Pattern;
use serde_json::{Map, Value};
use std::cell::OnceCell;
use std::collections::{BTreeSet, HashMap};
use wire::router::DecideRequest;

/// An expression, in bytes.
const EXPRESSION_MAX: usize = 2048;
/// Nesting of an expression. Evaluation recurses, and each operator of a chain is one level.
const DEPTH_MAX: usize = 250;
/// The top-level variables, each with its fields if these are fixed.
const VARIABLES: [(&str, &[&str]); 4] = [
    ("task", &["type", "payload", "payload_ref"]),
    ("tenant_id", &[]),
    ("metadata", &[]),
    ("constraints", &["max_latency_ms", "max_cost"]),
];

pub enum Condition {
    Cel(Box<Expression>),
    Legacy(Legacy),
}

pub struct Expression {
    program: Program,
    /// The patterns of `matches()` by their text, compiled once and not for each decision.
    patterns: HashMap<String, Pattern>,
    /// The number of operators, variables and literals: the maximum steps of an evaluation without loops.
    size: u64,
}

pub enum Legacy {
    /// `{key: [values]}`: for each key, the metadata has one of the values.
    OneOf(Vec<(String, Vec<Value>)>),
    /// `{"op": [a, b]}`.
    Compare(Operator, Operand, Operand),
}

#[derive(Clone, Copy)]
pub enum Operator {
    Equal,
    NotEqual,
    Greater,
    Less,
    GreaterOrEqual,
    LessOrEqual,
    In,
}

pub enum Operand {
    Literal(Value),
    /// `{"var": "context.x"}`: a path into the metadata.
    Variable(Vec<String>),
}

/// What conditions see of a request. The variables of CEL are built when the first expression needs them.
pub struct Scope<'a> {
    request: &'a DecideRequest,
    payload: &'a Payload,
    variables: OnceCell<Vec<(&'static str, Val<'a>)>>,
}

/// The payload of the request, as a tree once an expression needs it.
#[derive(Default)]
pub struct Payload(OnceCell<Map<String, Value>>);

impl<'a> Scope<'a> {
    pub fn new(request: &'a DecideRequest, payload: &'a Payload) -> Self {
        Self { request, payload, variables: OnceCell::new() }
    }

    fn variables(&self) -> &[(&'static str, Val<'a>)] {
        self.variables.get_or_init(|| {
            let DecideRequest { task, tenant_id, metadata, constraints, .. } = self.request;
            let given = |fields: Vec<(&'static str, Option<Val<'a>>)>| {
                Val::Fields(
                    fields
                        .into_iter()
                        .filter_map(|(name, value)| Some((name, value?)))
                        .collect(),
                )
            };
            let constraints = constraints.unwrap_or_default();
            let payload = task.payload.as_ref();
            let payload = payload.map(|raw| Val::Object(self.payload.0.get_or_init(|| raw.map())));
            let number = |number: Option<f64>| number.map(|number| Val::Made(Cel::Float(number)));
            vec![
                (
                    "task",
                    given(vec![
                        ("type", Some(Val::Text(&task.task_type))),
                        ("payload", payload),
                        ("payload_ref", task.payload_ref.as_deref().map(Val::Text)),
                    ]),
                ),
                ("tenant_id", Val::Text(tenant_id)),
                ("metadata", metadata.as_ref().map_or_else(|| given(Vec::new()), Val::Object)),
                (
                    "constraints",
                    given(vec![
                        ("max_latency_ms", number(constraints.max_latency_ms)),
                        ("max_cost", number(constraints.max_cost)),
                    ]),
                ),
            ]
        })
    }

    fn metadata(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter()
            .try_fold(self.request.metadata.as_ref()?.get(first)?, |value, key| value.get(key))
    }
}

impl Condition {
    pub fn compile(when: &Value) -> Result<Self, String> {
        match when {
            Value::String(text) if text.len() > EXPRESSION_MAX => {
                Err(format!("has {} bytes; an expression may have {EXPRESSION_MAX}", text.len()))
            }
            Value::String(text) => {
                // The parser panics on some inputs, and a policy file must not end the router.
                let parsed = std::panic::catch_unwind(|| Program::compile(text));
                let program = parsed
                    .map_err(|_| "cannot be parsed".to_string())?
                    .map_err(|e| e.to_string())?;

                let (mut size, mut patterns) = (0, HashMap::new());
                visit(program.expression(), &mut |expr| {
                    size += 1;
                    compile_pattern(expr, &mut patterns)
                })?;
                Ok(Self::Cel(Box::new(Expression { program, patterns, size })))
            }
            Value::Object(object) => Legacy::compile(object).map(Self::Legacy),
            other => Err(format!("is {other}, neither an expression nor an object")),
        }
    }

    /// Whether the condition holds, evaluated in at most so many steps. An undefined variable makes it false and is not
    /// an error.
    pub fn holds(&self, scope: &Scope<'_>, steps: u64) -> Result<bool, Stop> {
        let meter = Meter { left: steps };
        let holds = match self {
            Self::Legacy(legacy) => legacy.holds(scope, meter),
            Self::Cel(expression) => {
                let (variables, patterns) = (scope.variables(), &expression.patterns);
                let mut evaluation = Evaluation { variables, patterns, loops: Vec::new(), meter };
                evaluation.truth(expression.program.expression())
            }
        };
        if holds == Err(Stop::Undefined) {
            Ok(false)
        } else {
            holds
        }
    }

    /// The maximum steps of an evaluation without loops and long texts.
    pub fn size(&self) -> u64 {
        match self {
            Self::Cel(expression) => expression.size,
            Self::Legacy(_) => 1,
        }
    }

    /// Names that no request can have, which are likely typos.
    pub fn lints(&self) -> Vec<String> {
        let Self::Cel(expression) = self else { return Vec::new() };
        let mut lints = BTreeSet::new();
        let mut bound = Vec::new();
        let found = visit(expression.program.expression(), &mut |expr| {
            if let Expr::Comprehension(each) = &expr.expr {
                bound.push(each.iter_var.as_str());
            }
            Ok(())
        });

        let linted = found.and_then(|()| {
            visit(expression.program.expression(), &mut |expr| {
                lints.extend(lint(&expr.expr, &bound));
                Ok(())
            })
        });
        debug_assert_eq!(linted, Ok(()), "neither visit fails");
        lints.into_iter().collect()
    }
}

fn lint(expr: &Expr, bound: &[&str]) -> Option<String> {
    match expr {
        Expr::Ident(name) => {
            let known = name.starts_with('@') || bound.contains(&name.as_str());
            if known || VARIABLES.iter().any(|(known, _)| known == name) || eval::is_type(name) {
                return None;
            }
            let names = VARIABLES.map(|(name, _)| name).join(", ");
            Some(format!("unknown variable {name:?}; known are {names}"))
        }
        Expr::Select(SelectExpr { operand, field, .. }) => {
            let Expr::Ident(name) = &operand.expr else { return None };
            let (_, fields) = VARIABLES
                .iter()
                .find(|(known, fields)| known == name && !fields.is_empty())?;
            let known = bound.contains(&name.as_str()) || fields.contains(&field.as_str());
            (!known).then(|| format!("unknown field \"{name}.{field}\"; known are {}", fields.join(", ")))
        }
        Expr::Call(call) => {
            let is_name = call
                .func_name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            // A function that exists fails with another error, because of its argument.
            let called = || eval::resolve(&call.func_name, call.target.is_some(), vec![Cel::Null]);
            let unknown = is_name && matches!(called(), Err(ExecutionError::UndeclaredReference(_)));
            unknown.then(|| format!("unknown function {}()", call.func_name))
        }
        _ => None,
    }
}

/// Calls `each` for every part of an expression; fails if the expression nests too deep.
fn visit<'a>(expr: &'a IdedExpr, each: &mut dyn FnMut(&'a IdedExpr) -> Result<(), String>) -> Result<(), String> {
    // A work list instead of recursion: the expression may be too deep for the stack.
    let mut left = vec![(expr, 1)];
    while let Some((expr, depth)) = left.pop() {
        if depth > DEPTH_MAX {
            return Err(format!("nests more than {DEPTH_MAX} deep"));
        }
        each(expr)?;

        let mut part = |part| left.push((part, depth + 1));
        match &expr.expr {
            Expr::Call(call) => call.target.as_deref().into_iter().chain(&call.args).for_each(part),
            Expr::Select(select) => part(&select.operand),
            Expr::List(list) => list.elements.iter().for_each(part),
            Expr::Map(map) => map.entries.iter().for_each(|entry| match &entry.expr {
                EntryExpr::MapEntry(entry) => [&entry.key, &entry.value].into_iter().for_each(&mut part),
                EntryExpr::StructField(field) => part(&field.value),
            }),
            Expr::Comprehension(of) => {
                [&of.iter_range, &of.accu_init, &of.loop_cond, &of.loop_step, &of.result]
                    .into_iter()
                    .for_each(part);
            }
            Expr::Struct(_) | Expr::Ident(_) | Expr::Literal(_) | Expr::Unspecified => {}
        }
    }
    Ok(())
}

fn compile_pattern(expr: &IdedExpr, patterns: &mut HashMap<String, Pattern>) -> Result<(), String> {
    let Expr::Call(call) = &expr.expr else { return Ok(()) };
    if call.func_name != "matches" {
        return Ok(());
    }
    let Some(Expr::Literal(LiteralValue::String(pattern))) = call.args.last().map(|arg| &arg.expr) else {
        return Err("matches() takes a pattern in quotes; a pattern from the request is not allowed".into());
    };
    patterns.insert(pattern.inner().into(), Pattern::compile(pattern.inner())?);
    Ok(())
}

impl Legacy {
    fn compile(object: &Map<String, Value>) -> Result<Self, String> {
        if let [(key, Value::Array(operands))] = object.iter().collect::<Vec<_>>()[..]
            && let Some(operator) = Operator::parse(key)
        {
            let [left, right] = operands.as_slice() else {
                return Err(format!("{key} takes two operands, not {}", operands.len()));
            };
            return Ok(Self::Compare(operator, Operand::compile(left), Operand::compile(right)));
        }

        let mut keys = Vec::new();
        for (key, values) in object {
            match values {
                Value::Array(values) if values.iter().all(|v| !v.is_object() && !v.is_array()) && is_name(key) => {
                    keys.push((key.clone(), values.clone()));
                }
                _ => {
                    return Err(format!(
                        "{key:?} is neither an operator (== != > < >= <= in) nor a key with its values"
                    ));
                }
            }
        }

        // `{"almost": [1, 2]}` would be a valid key with its values, but is far more likely a mistyped operator.
        if keys
            .iter()
            .any(|(_, values)| values.len() == 2 && values.iter().all(Value::is_number))
        {
            return Err("compares numbers by a key; write {\"in\": [{\"var\": \"context.key\"}, [..]]}".into());
        }

        if keys.is_empty() {
            Err("is empty".into())
        } else {
            Ok(Self::OneOf(keys))
        }
    }

    fn holds(&self, scope: &Scope<'_>, mut meter: Meter) -> Result<bool, Stop> {
        match self {
            Self::OneOf(keys) => {
                for (key, values) in keys {
                    let Some(found) = scope.metadata(std::slice::from_ref(key)) else {
                        return Ok(false);
                    };
                    if !is_among(found, values, &mut meter)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            Self::Compare(operator, left, right) => match (left.resolve(scope), right.resolve(scope)) {
                (Some(left), Some(right)) => operator.apply(left, right, &mut meter),
                _ => Ok(false),
            },
        }
    }
}

fn is_among(value: &Value, values: &[Value], meter: &mut Meter) -> Result<bool, Stop> {
    for other in values {
        if is_equal(value, other, meter)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_equal(left: &Value, right: &Value, meter: &mut Meter) -> Result<bool, Stop> {
    meter.json(left)?;
    Ok(left == right)
}

fn is_name(key: &str) -> bool {
    key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

impl Operand {
    fn compile(value: &Value) -> Self {
        match value.get("var").and_then(Value::as_str) {
            Some(path) => {
                let path = path.strip_prefix("context.").unwrap_or(path);
                Self::Variable(path.split('.').map(String::from).collect())
            }
            None => Self::Literal(value.clone()),
        }
    }

    fn resolve<'a>(&'a self, scope: &'a Scope<'_>) -> Option<&'a Value> {
        match self {
            Self::Literal(value) => Some(value),
            Self::Variable(path) => scope.metadata(path),
        }
    }
}

impl Operator {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "==" => Self::Equal,
            "!=" => Self::NotEqual,
            ">" => Self::Greater,
            "<" => Self::Less,
            ">=" => Self::GreaterOrEqual,
            "<=" => Self::LessOrEqual,
            "in" => Self::In,
            _ => return None,
        })
    }

    fn apply(self, left: &Value, right: &Value, meter: &mut Meter) -> Result<bool, Stop> {
        let order = || match (left, right) {
            (Value::Number(a), Value::Number(b)) => a.as_f64().partial_cmp(&b.as_f64()),
            (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
            _ => None,
        };

        Ok(match self {
            Self::Equal => is_equal(left, right, meter)?,
            Self::NotEqual => !is_equal(left, right, meter)?,
            Self::Greater => order().is_some_and(std::cmp::Ordering::is_gt),
            Self::Less => order().is_some_and(std::cmp::Ordering::is_lt),
            Self::GreaterOrEqual => order().is_some_and(std::cmp::Ordering::is_ge),
            Self::LessOrEqual => order().is_some_and(std::cmp::Ordering::is_le),
            Self::In => match right.as_array() {
                Some(values) => is_among(left, values, meter)?,
                None => false,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn request(metadata: Value) -> DecideRequest {
        let request = json!({"version": "1", "request_id": "r", "tenant_id": "t", "metadata": metadata,
            "task": {"type": "chat", "payload": {"n": 3, "text": "some text"}}});
        serde_json::from_value(request).unwrap()
    }

    /// Evaluates with unlimited steps; `None` if the condition does not compile.
    fn holds(when: &str, metadata: Value) -> Option<Result<bool, Stop>> {
        let condition = Condition::compile(&when.into()).ok()?;
        Some(condition.holds(&Scope::new(&request(metadata), &Payload::default()), u64::MAX))
    }

    /// Evaluates with a budget of steps.
    fn within(steps: u64, when: &str, metadata: &Value) -> Result<bool, Stop> {
        let condition = Condition::compile(&when.into()).unwrap_or_else(|e| panic!("{when}: {e}"));
        condition.holds(&Scope::new(&request(metadata.clone()), &Payload::default()), steps)
    }

    #[test]
    fn numbers_of_requests_compare_and_compute() {
        let metadata = json!({"tokens": 5000, "score": 1.5, "zero": 0, "minus": -3, "big": u64::MAX, "least": i64::MIN,
            "list": [1, 2, 3], "limits": {"max": 4000}});
        for (when, expected) in [
            ("metadata.tokens / 1000 > 4", true),
            ("metadata.tokens - 1 == 4999", true),
            ("metadata.tokens + 1 == 5001", true),
            ("metadata.tokens * 2 == 10000", true),
            ("metadata.tokens % 2 == 0", true),
            ("-metadata.tokens == -5000", true),
            ("metadata.tokens > metadata.limits.max", true),
            ("metadata.tokens == 5000", true),
            ("metadata.tokens == 5000.0", true),
            ("metadata.tokens > 4.5", true),
            ("metadata.tokens < 4999.5", false),
            ("metadata.score > 1", true),
            ("metadata.score < 2", true),
            ("metadata.score == 1", false),
            ("metadata.score * 2.0 == 3.0", true),
            ("double(metadata.tokens) * 0.5 == 2500.0", true),
            ("int(metadata.score) == 1", true),
            ("metadata.minus < 0", true),
            ("metadata.minus < metadata.zero", true),
            ("metadata.big > 9223372036854775807", true),
            ("metadata.big == 18446744073709551615u", true),
            ("metadata.big > metadata.minus", true),
            ("metadata.least < -9223372036854775807", true),
            ("metadata.list[1] + metadata.list[2] == 5", true),
            ("metadata.list.map(n, n * 2) == [2, 4, 6]", true),
            ("metadata.list.exists(n, n == metadata.list.size())", true),
            ("5000 in [metadata.tokens, 1]", true),
            ("task.payload.n + 1 == 4", true),
            ("size(task.payload.text) == 9", true),
        ] {
            assert_eq!(holds(when, metadata.clone()), Some(Ok(expected)), "{when}");
        }
    }

    #[test]
    fn expressions_mean_what_cel_says() {
        let metadata = json!({"lang": "rust", "tags": ["a", "b"], "user": {"name": "ann", "age": 40}, "nothing": null});
        for (when, expected) in [
            ("task.type == 'chat' && metadata.lang in ['go', 'rust']", true),
            ("metadata.tags.all(t, t.size() == 1) && !metadata.tags.exists(t, t == 'c')", true),
            ("metadata.tags.exists_one(t, t == 'a')", true),
            ("metadata.tags.filter(t, t != 'a') == ['b']", true),
            ("metadata.tags.map(t, t == 'b', t + '!') == ['b!']", true),
            ("metadata.tags + ['c'] == ['a', 'b', 'c']", true),
            ("metadata.tags.exists(t, t.size() / 0 == 1 || t == 'b')", true),
            ("metadata.user.exists(key, key == 'age')", true),
            ("metadata.user == {'name': 'ann', 'age': 40}", true),
            ("{'a': 1}['a'] == 1 && {'a': {'b': 2}}.a.b == 2", true),
            ("has(metadata.user.name) && !has(metadata.user.email)", true),
            ("'name' in metadata.user && 'type' in task && !('x' in metadata)", true),
            (
                "metadata['lang'].startsWith('ru') && metadata.lang.endsWith('st') && metadata.lang.contains('us')",
                true,
            ),
            ("metadata.lang.matches('^r.*t$')", true),
            ("metadata.lang > 'go' ? true : false", true),
            ("metadata.missing == 1 || metadata.lang == 'rust'", true),
            ("metadata.nothing == null", true),
            ("type(metadata.lang) == string && type(1) == int", true),
            ("timestamp('2026-01-02T00:00:00Z') - timestamp('2026-01-01T00:00:00Z') == duration('24h')", true),
            ("tenant_id == 't'", true),
            ("metadata.missing", false),
            ("metadata.user.email == 'x'", false),
            ("metadata.nothing.x == 1", false),
            ("metadata.tags[7] == 'a'", false),
            ("taks.type == 'chat'", false),
        ] {
            assert_eq!(holds(when, metadata.clone()), Some(Ok(expected)), "{when}");
        }
    }

    #[test]
    fn failing_expressions_are_errors_without_values_of_the_request() {
        let least = json!({"a": i64::MIN, "b": -1, "s": "secret é"});
        for when in [
            "metadata.a / metadata.b > 0",
            "metadata.a % metadata.b > 0",
            "-metadata.a > 0",
            "metadata.a - 1 > 0",
            "metadata.a * metadata.b > 0",
            "metadata.a / 0 > 0",
            "metadata.a * 1.5 > 0.0",
            "metadata.s > 3",
            "metadata.s[1] == 'x'",
            "metadata.s + 1 == 'x'",
            "metadata.s.all(c, c == 'x')",
            "metadata.s.beginsWith('s')",
            "metadata.s.size",
            "duration('1000000000000000000h') > duration('1s')",
            "timestamp(metadata.s) > timestamp('y')",
            "int(1e300) > 0",
            "uint(-1) > 0",
            "int(metadata.s) > 0",
            "metadata.s",
        ] {
            match holds(when, least.clone()) {
                Some(Err(Stop::Failed(error))) => assert!(!error.contains("secret"), "{when}: {error}"),
                other => panic!("{when}: {other:?}"),
            }
        }
        for when in ["[1][5] == 1", "[1][metadata.a] == 1"] {
            assert_eq!(holds(when, least.clone()), Some(Ok(false)), "{when}");
        }
    }

    #[test]
    fn deep_expressions_are_refused() {
        for (start, step, end) in [
            ("", "(", ""),
            ("", "!", "true"),
            ("", "-", "1 == 1"),
            ("1", "+1", "==1"),
            ("true", "||true", ""),
            ("false", "||false", ""),
            ("true", "?true:true", ""),
            ("metadata", ".a", "==1"),
            ("metadata", "[0]", "==1"),
            ("", "[", ""),
            ("", "{1:", ""),
            ("", "size(", ""),
            ("1", "==1", ""),
            ("1", " in[1]", ""),
        ] {
            let longest = |max: usize| {
                let room = max - start.len() - end.len();
                format!("{start}{}{end}", step.repeat(room / step.len()))
            };
            holds(&longest(EXPRESSION_MAX), json!({"a": {"a": 1}}));
            holds(&longest(DEPTH_MAX * step.len()), json!({"a": {"a": 1}}));
            assert_eq!(holds(&longest(100_000), json!({})), None, "{step}");
        }
    }

    #[test]
    fn evaluation_ends_when_its_steps_are_spent() {
        let numbers: Vec<u32> = (0..100_000).collect();
        let long = "ab".repeat(400_000);
        let metadata = json!({"l": numbers, "s": long, "t": long, "deep": vec![vec![1; 300]; 300],
            "m": numbers.iter().map(|n| (n.to_string(), json!(n))).collect::<Map<_, _>>()});
        for when in [
            "metadata.l.all(x, metadata.l.exists(y, y == x))",
            "metadata.l.all(x, x in metadata.l)",
            "metadata.l.all(x, x >= 0)",
            "metadata.l.map(x, metadata.l) == []",
            "metadata.l.map(x, x).map(x, x).map(x, x).size() == 0",
            "[metadata.l.filter(x, true)].all(l, l.all(x, l.all(y, true)))",
            "metadata.l == metadata.l",
            "metadata.l + metadata.l == []",
            "metadata.l.exists(x, metadata.s.contains('c'))",
            "metadata.l.exists(x, metadata.s == metadata.t + 'x')",
            "metadata.l.exists(x, metadata.s < metadata.t)",
            "metadata.l.exists(x, size(metadata.s) == 1)",
            "metadata.s + metadata.s + metadata.s + metadata.s + metadata.s + metadata.s + metadata.s + metadata.s == ''",
            "metadata.s.matches('(a|b)*a(a|b){30}c')",
            "metadata.m.all(k, metadata.m[k] >= 0)",
            "metadata.m == metadata.m",
            "metadata.deep.all(l, l.all(x, l.exists(y, x == y)))",
            "bytes(metadata.s) == b'' || bytes(metadata.t) == b'' || bytes(metadata.s + 'x') == b''",
            "metadata.l.all(x, timestamp('2026-01-01T00:00:00Z') > timestamp('2025-01-01T00:00:00Z'))",
        ] {
            assert_eq!(within(20_000, when, &metadata), Err(Stop::Spent), "{when}");
        }
        for legacy in [
            json!({"in": [{"var": "s"}, {"var": "l"}]}),
            json!({"==": [{"var": "l"}, {"var": "l"}]}),
            json!({"l": vec![1; 3]}),
        ] {
            let condition = Condition::compile(&legacy).unwrap();
            assert_eq!(
                condition.holds(&Scope::new(&request(metadata.clone()), &Payload::default()), 20_000),
                Err(Stop::Spent),
                "{legacy}"
            );
        }
        // Large values that are not evaluated cost nothing.
        let untouched =
            "task.type == 'chat' && metadata.l.size() == 100000 && metadata.l[99999] == 99999 && 'm' in metadata";
        assert_eq!(within(50, untouched, &metadata), Ok(true));
    }

    #[test]
    fn everyday_conditions_take_few_steps() {
        let tags: Vec<String> = (0..100).map(|n| format!("tag-{n}")).collect();
        let metadata = json!({"lang": "rust", "tags": tags, "prompt": "word ".repeat(400)});
        for (steps, when) in [
            (20, "task.type == 'chat' && metadata.lang == 'rust'"),
            (1000, "metadata.tags.exists(t, t == 'tag-99')"),
            (400, "'tag-99' in metadata.tags"),
            (50, "metadata.prompt.contains('word word')"),
            (2000, "metadata.prompt.matches('(?i)\\\\bword\\\\b')"),
        ] {
            assert_eq!(within(steps, when, &metadata), Ok(true), "{when}");
        }
    }

    #[test]
    fn patterns_must_be_literals_of_bounded_size() {
        for (when, expected) in [
            ("metadata.s.matches(metadata.pattern)", "takes a pattern in quotes"),
            ("metadata.s.matches('(')", "unclosed group"),
            ("metadata.s.matches('(?:[a-z]{1000}){1000}')", "exceeded limit"),
        ] {
            let error = Condition::compile(&when.into()).err().unwrap();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn unknown_names_are_lints() {
        for (when, expected) in [
            (
                "taks.type == 'chat'",
                vec!["unknown variable \"taks\"; known are task, tenant_id, metadata, constraints"],
            ),
            ("task.typ == 'chat'", vec!["unknown field \"task.typ\"; known are type, payload, payload_ref"]),
            ("metadata.lang.beginsWith('r')", vec!["unknown function beginsWith()"]),
            (
                "metadata.tags.exists(t, t == x)",
                vec!["unknown variable \"x\"; known are task, tenant_id, metadata, constraints"],
            ),
            (
                "type(metadata.a) == int && size(metadata.b) > 2 && metadata.s.matches('x') && has(task.payload.x)",
                vec![],
            ),
            ("metadata.tags.all(t, t.startsWith('x')) && timestamp(metadata.at).getHours() < 8", vec![]),
        ] {
            assert_eq!(Condition::compile(&when.into()).unwrap().lints(), expected, "{when}");
        }
    }
}
