"""The tokens of direct mode: the API signs one per job, the worker that it names lets that one job in.

A token is a JSON Web Token (RFC 7519), signed with HMAC-SHA256 under a secret that lies in the region's store
(tasks/ledger.py): whoever can read that store can read and write its jobs anyway, so the signature opens nothing more,
no secret of the API leaves it, and a region's token is worth nothing in another region.

    jti   id of the job that it lets in; the ledger takes an id once, so a token is good for one job
    aud   worker id             sub   owner of the job          iat, exp   unix seconds
    type  job type              addr  address that the client calls from
    tkt   what the job's outcome must carry (app/tickets.py)
"""

from dataclasses import dataclass

import jwt

from engines.catalogue import JobType

ALGORITHM = "HS256"
#: How far the clocks of an API host and a worker may be apart.
LEEWAY_S = 5


@dataclass(frozen=True, slots=True)
class Token:
    """What a token states."""

    job_id: str
    worker_id: str
    owner: str
    type: JobType
    #: As ipaddress writes it.
    address: str
    #: Unix seconds, whole.
    issued_at: int
    expires_at: int
    #: What the job's outcome must carry.
    ticket: str = ""

    def sign(self, secret: str) -> str:
        """As the client carries it."""
        claims = {
            "jti": self.job_id,
            "aud": self.worker_id,
            "sub": self.owner,
            "type": str(self.type),
            "addr": self.address,
            "iat": self.issued_at,
            "exp": self.expires_at,
            "tkt": self.ticket,
        }
        return jwt.encode(claims, secret, algorithm=ALGORITHM)


class TokenRefused(Exception):
    """The token opens nothing here; code is for programs, the message for people."""

    def __init__(self, code: str, message: str, *, elsewhere: bool = False) -> None:
        """elsewhere: the token is sound, but for another worker or client."""
        super().__init__(message)
        self.code = code
        self.elsewhere = elsewhere


def verify(text: str, secret: str, *, worker_id: str, address: str) -> Token:
    """The token that a client at this address presents to this worker. Raises TokenRefused."""
    required = ["jti", "aud", "sub", "type", "addr", "iat", "exp"]
    try:
        claims = jwt.decode(
            text, secret, algorithms=[ALGORITHM], audience=worker_id, leeway=LEEWAY_S, options={"require": required}
        )
        token = Token(
            job_id=claims["jti"],
            worker_id=worker_id,
            owner=claims["sub"],
            type=JobType(claims["type"]),
            address=str(claims["addr"]),
            issued_at=int(claims["iat"]),
            expires_at=int(claims["exp"]),
            ticket=str(claims.get("tkt", "")),
        )
    except jwt.ExpiredSignatureError:
        raise TokenRefused("token_expired", "This token has expired; ask for the nearest worker again.") from None
    except jwt.InvalidAudienceError:
        message = "This token is for another worker; ask for the nearest worker again."
        raise TokenRefused("token_elsewhere", message, elsewhere=True) from None
    except (jwt.InvalidTokenError, ValueError, TypeError):
        # Not why: that would tell a forger what to change.
        raise TokenRefused("token_refused", "This token was not signed for this region, or was changed.") from None
    if token.address != address:
        message = f"This token is for a client at another address than yours, which is {address} from here."
        raise TokenRefused("token_elsewhere", message, elsewhere=True)
    return token
