"""Webhooks and their deliveries, and whether the end of a job was handed on"""

import sqlalchemy as sa
from alembic import op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None

_IS_UNNOTED = sa.text("noted_at IS NULL AND completed_at IS NOT NULL")
_IS_UNCOUNTED = sa.text("noted_at IS NULL")
_IS_TO_BE_SENT = sa.text("next_at IS NOT NULL")


def upgrade() -> None:
    op.add_column('jobs', sa.Column('noted_at', sa.Double(), nullable=True))
    # What ended before is nobody's news.
    op.execute('UPDATE jobs SET noted_at = completed_at WHERE completed_at IS NOT NULL')
    op.create_index('unnoted', 'jobs', ['completed_at'], unique=False, sqlite_where=_IS_UNNOTED, postgresql_where=_IS_UNNOTED)
    op.create_index('unnoted_of_owner', 'jobs', ['owner'], unique=False, sqlite_where=_IS_UNCOUNTED, postgresql_where=_IS_UNCOUNTED)
    op.create_table('webhooks',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('owner', sa.String(length=64), nullable=False),
    sa.Column('url', sa.String(length=2048), nullable=False),
    sa.Column('description', sa.String(length=255), nullable=False),
    sa.Column('events', sa.String(length=255), nullable=False),
    sa.Column('job_types', sa.String(length=255), nullable=False),
    sa.Column('secret', sa.String(length=128), nullable=False),
    sa.Column('old_secret', sa.String(length=128), nullable=True),
    sa.Column('old_secret_until', sa.Double(), nullable=True),
    sa.Column('enabled', sa.Boolean(), nullable=False),
    sa.Column('disabled_reason', sa.Text(), nullable=True),
    sa.Column('failing_since', sa.Double(), nullable=True),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('webhooks_of_owner', 'webhooks', ['owner'], unique=False)
    op.create_table('webhook_deliveries',
    sa.Column('id', sa.String(length=36), nullable=False),
    sa.Column('webhook_id', sa.String(length=36), nullable=False),
    sa.Column('job_id', sa.String(length=36), nullable=True),
    sa.Column('event', sa.String(length=32), nullable=False),
    sa.Column('body', sa.Text(), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('tries', sa.SmallInteger(), nullable=False),
    sa.Column('log', sa.Text(), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.Column('next_at', sa.Double(), nullable=True),
    sa.Column('claim', sa.String(length=32), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('newest_of_webhook', 'webhook_deliveries', ['webhook_id', 'created_at', 'id'], unique=False)
    op.create_index('deliveries_due', 'webhook_deliveries', ['webhook_id', 'next_at'], unique=False, sqlite_where=_IS_TO_BE_SENT, postgresql_where=_IS_TO_BE_SENT)
    op.create_index('oldest_deliveries', 'webhook_deliveries', ['created_at'], unique=False)


def downgrade() -> None:
    op.drop_table('webhook_deliveries')
    op.drop_table('webhooks')
    op.drop_index('unnoted_of_owner', table_name='jobs')
    op.drop_index('unnoted', table_name='jobs')
    op.drop_column('jobs', 'noted_at')
