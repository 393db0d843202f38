"""Queued jobs move between regions"""

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None

_IS_QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.add_column(sa.Column('losses', sa.SmallInteger(), server_default='0', nullable=False))
        batch_op.create_index('oldest_queued', ['region', 'created_at'], unique=False, sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED)
    # Until now every attempt but the first followed a lost worker.
    op.execute('UPDATE jobs SET losses = attempt - 1')


def downgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.drop_index('oldest_queued')
        batch_op.drop_column('losses')
