//! PostgreSQL's wire protocol: psql, Grafana, Metabase, Superset and psycopg need no plugin.
//!
//! The protocol and the catalogue rewrites are datafusion-postgres's; whoever gets in and what may run is decided
//! here. Every statement passes [`sql::allow`] before any other hook sees it, in the simple and in the extended
//! protocol, and queries run through [`Queries`] alone.
//!
//! * No users configured: everyone may connect, and the address must be a loopback one (checked by
//!   [`super::ServeSettings::check`]).
//! * Users configured: SCRAM-SHA-256, so that no password crosses the wire, with TLS or without.
//! * TLS fails closed: a certificate that cannot be read stops the server.
//! * At most `serve.max_connections` at a time; further ones are closed at once.
//! * Whoever was refused at login is asked nothing more: pgwire would go on to read and answer, so [`Gate`] lets nothing
//!   pass of a connection that has not logged in, and the connection ends.

use std::{collections::BTreeMap, fmt::Debug, path::Path, sync::Arc, time::Duration};

use anyhow::Context;
use async_trait::async_trait;
use datafusion::{
    common::{DFSchema, ParamValues},
    logical_expr::{EmptyRelation, LogicalPlan},
    prelude::SessionContext,
    sql::sqlparser::ast::{Set, Statement},
};
use datafusion_postgres::{
    DfSessionService, QueryHook,
    arrow_pg::datatypes::{arrow_schema_to_pg_fields, encode_recordbatch},
    hooks::{HookClient, set_show::SetShowHook, transactions::TransactionStatementHook},
    pgwire::{
        api::{
            ClientInfo, ClientPortalStore, ConnectionManager, ErrorHandler, PgWireConnectionState,
            PgWireServerHandlers, Type,
            auth::{
                AuthSource, DefaultServerParameterProvider, LoginInfo, Password, StartupHandler,
                noop::NoopStartupHandler,
                sasl::{
                    SASLAuthStartupHandler,
                    scram::{SCRAM_ITERATIONS, ScramAuth, gen_salted_password},
                },
            },
            cancel::{CancelHandler, DefaultCancelHandler},
            portal::{Format, Portal},
            query::{ExtendedQueryHandler, SimpleQueryHandler},
            results::{DataRowEncoder, FieldFormat, FieldInfo, QueryResponse, Response, Tag},
            store::PortalStore,
        },
        error::{ErrorInfo, PgWireError, PgWireResult},
        messages::{PgWireBackendMessage, PgWireFrontendMessage, data::DataRow, response::TransactionStatus},
        tokio::{TlsAcceptor, process_socket},
        types::format::FormatOptions,
    },
};
use futures::{Sink, Stream, StreamExt, stream};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use tokio::{
    net::TcpListener,
    sync::{Notify, Semaphore, watch},
    time::Instant,
};
use tracing::{debug, warn};

use super::{
    catalog::DATABASE,
    functions::{self, POSTGRES_VERSION},
    sql::{self, Limits, Purpose, Queries, SqlError},
};

/// Who may connect.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Names and passwords; nobody needs one when this is empty.
    pub users: BTreeMap<String, String>,
    /// Certificate chain and key.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Connections at a time.
    pub max_connections: usize,
}

/// Reads a certificate chain and its key, both PEM.
///
/// # Errors
/// When a file cannot be read or used; there is no falling back to plain text.
pub fn read_tls(certificate: &Path, key: &Path) -> anyhow::Result<Arc<rustls::ServerConfig>> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("serve.tls_certificate: reading {}", certificate.display()))?;
    let private = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("serve.tls_key: reading {}", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .context("serve.tls_certificate does not fit serve.tls_key")?;
    Ok(Arc::new(config))
}

/// Answers clients on `listener` until `stop` becomes true.
///
/// # Errors
/// Never at present; a connection's failure ends that connection.
pub async fn serve(
    listener: TcpListener,
    queries: Arc<Queries>,
    access: Access,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let room = Arc::new(Semaphore::new(access.max_connections));
    let tls = access.tls.clone().map(TlsAcceptor::from);
    let server = Arc::new(Server::new(queries, access.users));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: the next accept would fail at once, too.
                warn!(%error, "accepting a PostgreSQL connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            warn!(%peer, "PostgreSQL connection refused: serve.max_connections reached");
            continue;
        };
        let (tls, mut stop, refused) = (tls.clone(), stop.clone(), Arc::new(Notify::new()));
        let connection = Connection { server: Arc::clone(&server), refused: Arc::clone(&refused) };
        tokio::spawn(async move {
            let _permit = permit;
            // The client may still read why.
            let farewell = async {
                refused.notified().await;
                tokio::time::sleep(FAREWELL).await;
            };
            tokio::select! {
                ended = process_socket(socket, tls, connection) => {
                    if let Err(error) = ended {
                        debug!(%peer, %error, "PostgreSQL connection ended");
                    }
                }
                () = farewell => debug!(%peer, "PostgreSQL login refused"),
                _ = stop.wait_for(|stop| *stop) => {}
            }
        });
    }
}

/// How long a connection lasts whose login was refused.
const FAREWELL: Duration = Duration::from_secs(1);

/// The handlers of one connection.
struct Connection {
    server: Arc<Server>,
    /// Told when its login fails.
    refused: Arc<Notify>,
}

/// What every connection of a server has.
struct Server {
    session: Arc<Extended>,
    connections: Arc<ConnectionManager>,
    users: Option<Arc<Users>>,
}

impl Server {
    fn new(queries: Arc<Queries>, users: BTreeMap<String, String>) -> Self {
        let context = Arc::new(queries.catalog().context().clone());
        // In this order: the gate decides, then PostgreSQL's manners, and what is left is a query.
        let hooks: Vec<Arc<dyn QueryHook>> = vec![
            Arc::new(Gate),
            Arc::new(TransactionStatementHook),
            Arc::new(SetShowHook),
            Arc::new(Run { queries }),
        ];
        Self {
            session: Arc::new(Extended(DfSessionService::new_with_hooks(context, hooks))),
            connections: Arc::new(ConnectionManager::new()),
            users: (!users.is_empty()).then(|| Arc::new(Users::new(users))),
        }
    }
}

impl PgWireServerHandlers for Connection {
    fn simple_query_handler(&self) -> Arc<impl SimpleQueryHandler> {
        Arc::clone(&self.server.session)
    }

    fn extended_query_handler(&self) -> Arc<impl ExtendedQueryHandler> {
        Arc::clone(&self.server.session)
    }

    /// Called once for each connection, whose state the SCRAM exchange keeps.
    fn startup_handler(&self) -> Arc<impl StartupHandler> {
        let connections = Arc::clone(&self.server.connections);
        let how = match &self.server.users {
            None => How::Open(Open { connections }),
            Some(users) => {
                let source: Arc<dyn AuthSource> = Arc::clone(users) as _;
                let handler = SASLAuthStartupHandler::new(Arc::new(parameters()))
                    .with_scram(ScramAuth::new(source))
                    .with_connection_manager(connections);
                How::Scram(Box::new(handler))
            }
        };
        Arc::new(Login { how, refused: Arc::clone(&self.refused) })
    }

    fn error_handler(&self) -> Arc<impl ErrorHandler> {
        Arc::new(Errors)
    }

    fn cancel_handler(&self) -> Arc<impl CancelHandler> {
        Arc::new(DefaultCancelHandler::new(Arc::clone(&self.server.connections)))
    }
}

/// datafusion-postgres's handlers, which tell their hooks everything but the formats that the client asked for:
/// those are left with the connection.
struct Extended(DfSessionService);

/// Formats of the columns of the portal that is being executed.
struct AskedFormat(Format);

#[async_trait]
impl SimpleQueryHandler for Extended {
    async fn do_query<C>(&self, client: &mut C, query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        SimpleQueryHandler::do_query(&self.0, client, query).await
    }
}

#[async_trait]
impl ExtendedQueryHandler for Extended {
    type Statement = <DfSessionService as ExtendedQueryHandler>::Statement;
    type QueryParser = <DfSessionService as ExtendedQueryHandler>::QueryParser;

    fn query_parser(&self) -> Arc<Self::QueryParser> {
        self.0.query_parser()
    }

    async fn do_query<C>(
        &self,
        client: &mut C,
        portal: &Portal<Self::Statement>,
        max_rows: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        client.session_extensions().insert(AskedFormat(portal.result_column_format.clone()));
        ExtendedQueryHandler::do_query(&self.0, client, portal, max_rows).await
    }
}

fn parameters() -> DefaultServerParameterProvider {
    let mut parameters = DefaultServerParameterProvider::default();
    parameters.server_version = POSTGRES_VERSION.to_owned();
    parameters.search_path = super::catalog::DEFAULT_SCHEMA.to_owned();
    parameters.is_superuser = false;
    parameters.default_transaction_read_only = true;
    parameters
}

/// A connection's beginning.
struct Login {
    how: How,
    refused: Arc<Notify>,
}

/// Left with a connection that has logged in.
struct LoggedIn;

enum How {
    Open(Open),
    Scram(Box<SASLAuthStartupHandler<DefaultServerParameterProvider>>),
}

/// Everyone may come in.
struct Open {
    connections: Arc<ConnectionManager>,
}

#[async_trait]
impl NoopStartupHandler for Open {
    fn connection_manager(&self) -> Option<Arc<ConnectionManager>> {
        Some(Arc::clone(&self.connections))
    }
}

#[async_trait]
impl StartupHandler for Login {
    async fn on_startup<C>(&self, client: &mut C, message: PgWireFrontendMessage) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let begun = self.how.on_startup(client, message).await;
        match &begun {
            Ok(()) if matches!(client.state(), PgWireConnectionState::ReadyForQuery) => {
                client.session_extensions().insert(LoggedIn);
            }
            Ok(()) => {}
            Err(_) => self.refused.notify_one(),
        }
        begun
    }
}

impl How {
    async fn on_startup<C>(&self, client: &mut C, message: PgWireFrontendMessage) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        if let PgWireFrontendMessage::Startup(startup) = &message {
            let asked = startup.parameters.get("database").map_or("", String::as_str);
            if asked != DATABASE {
                let text = format!("database \"{asked}\" does not exist; connect to \"{DATABASE}\"");
                return Err(fatal("3D000", text));
            }
        }
        match self {
            How::Open(open) => open.on_startup(client, message).await,
            How::Scram(scram) => scram.on_startup(client, message).await,
        }
    }
}

fn fatal(sqlstate: &str, message: String) -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new("FATAL".into(), sqlstate.into(), message)))
}

/// Salted passwords. An unknown name gets a salt as well, so that names cannot be told from answers.
struct Users {
    salted: BTreeMap<String, Password>,
    secret: [u8; 16],
}

impl Users {
    fn new(users: BTreeMap<String, String>) -> Self {
        let secret = uuid::Uuid::now_v7().into_bytes();
        let salt = |name: &str| salt_of(&secret, name);
        let salted = users
            .into_iter()
            .map(|(name, password)| {
                let salt = salt(&name);
                let hash = gen_salted_password(&password, &salt, SCRAM_ITERATIONS);
                (name, Password::new(Some(salt), hash))
            })
            .collect();
        Self { salted, secret }
    }
}

fn salt_of(secret: &[u8; 16], name: &str) -> Vec<u8> {
    Sha256::new().chain_update(secret).chain_update(name).finalize()[..16].to_vec()
}

impl Debug for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Users").field("names", &self.salted.keys()).finish_non_exhaustive()
    }
}

#[async_trait]
impl AuthSource for Users {
    async fn get_password(&self, login: &LoginInfo) -> PgWireResult<Password> {
        let name = login.user().unwrap_or_default();
        Ok(self.salted.get(name).cloned().unwrap_or_else(|| {
            // A key that no password leads to.
            Password::new(Some(salt_of(&self.secret, name)), Sha256::digest(self.secret).to_vec())
        }))
    }
}

/// Gives the errors that datafusion-postgres passes on the SQLSTATE they deserve.
struct Errors;

impl ErrorHandler for Errors {
    fn on_error<C: ClientInfo>(&self, _: &C, error: &mut PgWireError) {
        let PgWireError::ApiError(inner) = error else { return };
        if let Some(e) = inner.downcast_ref::<datafusion::sql::sqlparser::parser::ParserError>() {
            *error = info(&SqlError::Invalid { sqlstate: "42601", message: e.to_string() });
        } else if inner.is::<datafusion::error::DataFusionError>() {
            let PgWireError::ApiError(inner) = std::mem::replace(error, PgWireError::InvalidSASLState) else {
                return;
            };
            if let Ok(e) = inner.downcast::<datafusion::error::DataFusionError>() {
                *error = info(&SqlError::from(*e));
            }
        }
    }
}

fn info(error: &SqlError) -> PgWireError {
    if let SqlError::Failed(why) = error {
        warn!(%why, "query failed");
    }
    let (state, text) = (error.sqlstate().to_owned(), error.to_string());
    PgWireError::UserError(Box::new(ErrorInfo::new("ERROR".into(), state, text)))
}

/// First of the hooks: nothing that is not on the allow-list gets past it.
struct Gate;

impl Gate {
    fn knows(client: &(impl ClientInfo + ?Sized)) -> PgWireResult<()> {
        let known = client.session_extensions().get::<LoggedIn>().is_some();
        if known { Ok(()) } else { Err(fatal("28000", "this connection has not logged in".to_owned())) }
    }

    /// What the gate itself answers: what clients say and nothing here depends on.
    fn answer(statement: &Statement, client: &mut dyn HookClient) -> Option<PgWireResult<Response>> {
        if let Err(stranger) = Gate::knows(client) {
            return Some(Err(stranger));
        }
        if let Err(refused) = sql::allow(statement) {
            return Some(Err(info(&refused)));
        }
        if let Statement::ShowVariable { variable } = statement
            && let [name] = variable.as_slice()
            && let Some(value) = functions::setting(&name.value)
            && !client.metadata().contains_key(&name.value.to_ascii_lowercase())
        {
            return Some(one_text(&name.value, value));
        }
        let tag = match statement {
            Statement::Savepoint { .. } => "SAVEPOINT",
            Statement::ReleaseSavepoint { .. } => "RELEASE",
            Statement::Rollback { savepoint: Some(_), .. } => {
                if client.transaction_status() == TransactionStatus::Error {
                    client.set_transaction_status(TransactionStatus::Transaction);
                }
                "ROLLBACK"
            }
            Statement::Discard { .. } => "DISCARD",
            Statement::Deallocate { .. } => "DEALLOCATE",
            Statement::Reset(_) => "RESET",
            // The server's snapshots and encoding are the same for everyone.
            Statement::Set(
                Set::SetTransaction { .. } | Set::SetNames { .. } | Set::SetNamesDefault { .. },
            ) => "SET",
            Statement::Set(Set::SingleAssignment { variable, .. })
                if !KEPT.contains(&variable.to_string().to_ascii_lowercase().as_str()) =>
            {
                "SET"
            }
            _ => return None,
        };
        Some(Ok(Response::Execution(Tag::new(tag))))
    }
}

/// An answer of one row and one column.
fn one_text(name: &str, value: &str) -> PgWireResult<Response> {
    let field = FieldInfo::new(name.to_owned(), None, None, Type::VARCHAR, FieldFormat::Text);
    let fields = Arc::new(vec![field]);
    let mut row = DataRowEncoder::new(Arc::clone(&fields));
    row.encode_field(&Some(value))?;
    let rows = stream::iter([Ok(row.take_row())]);
    Ok(Response::Query(QueryResponse::new(fields, boxed(rows))))
}

/// Variables that a client's session keeps; others are taken note of only by answering `SET`.
const KEPT: [&str; 7] = [
    "statement_timeout",
    "datestyle",
    "bytea_output",
    "intervalstyle",
    "application_name",
    "extra_float_digits",
    "search_path",
];

#[async_trait]
impl QueryHook for Gate {
    async fn handle_simple_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        client: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        Gate::answer(statement, client)
    }

    async fn handle_extended_parse_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        client: &(dyn ClientInfo + Send + Sync),
    ) -> Option<PgWireResult<LogicalPlan>> {
        if let Err(stranger) = Gate::knows(client) {
            return Some(Err(stranger));
        }
        let without_rows = || {
            let schema = Arc::new(DFSchema::empty());
            LogicalPlan::EmptyRelation(EmptyRelation { produce_one_row: false, schema })
        };
        match sql::allow(statement) {
            Err(refused) => Some(Err(info(&refused))),
            Ok(Purpose::Query) => None,
            Ok(_) if matches!(statement, Statement::ShowVariable { .. } | Statement::ShowCatalogs { .. }) => {
                None
            }
            Ok(_) => Some(Ok(without_rows())),
        }
    }

    async fn handle_extended_query(
        &self,
        statement: &Statement,
        _: &LogicalPlan,
        _: &ParamValues,
        _: &SessionContext,
        client: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        Gate::answer(statement, client)
    }
}

/// Last of the hooks: runs what has an answer.
struct Run {
    queries: Arc<Queries>,
}

impl Run {
    fn limits(&self, client: &(impl ClientInfo + ?Sized)) -> Limits {
        let limits = self.queries.limits();
        // A client may ask for less time, never for more.
        let asked = client.metadata().get("statement_timeout_ms").and_then(|ms| ms.parse().ok());
        let timeout =
            asked.map_or(limits.timeout, |ms| limits.timeout.min(std::time::Duration::from_millis(ms)));
        Limits { timeout, ..limits }
    }

    async fn respond(
        &self,
        plan: LogicalPlan,
        limits: Limits,
        deadline: Instant,
        format: &Format,
        client: &dyn HookClient,
    ) -> Result<Response, PgWireError> {
        let (schema, batches) = self.queries.execute(plan, limits, deadline).await.map_err(|e| info(&e))?;
        let options = Arc::new(FormatOptions::from_client_metadata(client.metadata()));
        let fields = Arc::new(arrow_schema_to_pg_fields(&schema, format, Some(options))?);
        let columns = Arc::clone(&fields);
        let rows = batches.flat_map(move |batch| {
            let rows: Box<dyn Iterator<Item = PgWireResult<DataRow>> + Send + Sync> = match batch {
                Ok(batch) => encode_recordbatch(Arc::clone(&columns), batch),
                Err(e) => Box::new(std::iter::once(Err(info(&e)))),
            };
            stream::iter(rows)
        });
        Ok(Response::Query(QueryResponse::new(fields, boxed(rows))))
    }
}

/// `QueryResponse` wants a stream that is `Send` alone.
fn boxed<T>(rows: impl Stream<Item = T> + Send + 'static) -> stream::BoxStream<'static, T> {
    rows.boxed()
}

#[async_trait]
impl QueryHook for Run {
    async fn handle_simple_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        client: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        let limits = self.limits(client);
        let deadline = Instant::now() + limits.timeout;
        let planned = tokio::time::timeout_at(deadline, self.queries.plan(statement.clone())).await;
        Some(match planned {
            Err(_) => Err(info(&SqlError::Timeout(limits.timeout))),
            Ok(Err(e)) => Err(info(&e)),
            Ok(Ok(plan)) => self.respond(plan, limits, deadline, &Format::UnifiedText, client).await,
        })
    }

    async fn handle_extended_parse_query(
        &self,
        statement: &Statement,
        _: &SessionContext,
        _: &(dyn ClientInfo + Send + Sync),
    ) -> Option<PgWireResult<LogicalPlan>> {
        Some(self.queries.plan(statement.clone()).await.map_err(|e| info(&e)))
    }

    async fn handle_extended_query(
        &self,
        _: &Statement,
        plan: &LogicalPlan,
        params: &ParamValues,
        _: &SessionContext,
        client: &mut dyn HookClient,
    ) -> Option<PgWireResult<Response>> {
        let limits = self.limits(client);
        let deadline = Instant::now() + limits.timeout;
        let bound = match Queries::bind(plan, params) {
            Ok(bound) => bound,
            Err(e) => return Some(Err(info(&e))),
        };
        let asked = client.session_extensions().get::<AskedFormat>();
        let format = asked.as_ref().map_or(&Format::UnifiedText, |asked| &asked.0);
        Some(self.respond(bound, limits, deadline, format, client).await)
    }
}
