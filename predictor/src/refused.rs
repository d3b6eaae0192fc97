//! Calls that tonic refuses before the service sees them, under the codes of the contract.

use std::convert::Infallible;
use std::task::{Context, Poll};

use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;

use crate::service::refusal;

/// A service whose own refusals pass through [`refusal`].
#[derive(Debug, Clone)]
pub(crate) struct Refused<S>(pub S);

impl<S: NamedService> NamedService for Refused<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Refused<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // Only an answer that is nothing but a status has it in its headers.
            Ok(match Status::from_header_map(answer.headers()) {
                Some(status) => refusal(status).into_http(),
                None => answer,
            })
        })
    }
}
