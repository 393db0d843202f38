"""The oldest wait of each queue, and what a job runs again"""

import sqlalchemy as sa
from alembic import op

revision = '0010'
down_revision = '0009'
branch_labels = None
depends_on = None

_IS_QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.add_column(sa.Column('retry_of', sa.String(36), nullable=True))
        batch_op.drop_index('oldest_queued')
        batch_op.create_index('oldest_queued', ['region', 'type', 'created_at'], unique=False, sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED)


def downgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.drop_index('oldest_queued')
        batch_op.create_index('oldest_queued', ['region', 'created_at'], unique=False, sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED)
        batch_op.drop_column('retry_of')
