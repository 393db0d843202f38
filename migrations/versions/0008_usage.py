"""What each key used, may use, and its weight; jobs that are held until it is their key's turn"""

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None

_IS_HELD = sa.text("status = 'queued' AND held_for IS NOT NULL")


def upgrade() -> None:
    op.add_column('jobs', sa.Column('held_for', sa.String(length=352), nullable=True))
    op.add_column('jobs', sa.Column('meter', sa.Text(), nullable=True))
    op.create_index('held', 'jobs', ['held_for', 'priority', 'owner', 'created_at'], unique=False, sqlite_where=_IS_HELD, postgresql_where=_IS_HELD)
    op.add_column('api_keys', sa.Column('weight', sa.Integer(), server_default='1', nullable=False))
    op.add_column('api_keys', sa.Column('quotas', sa.Text(), server_default='{}', nullable=False))
    op.create_table('usage',
    sa.Column('owner', sa.String(length=64), nullable=False),
    sa.Column('day', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('type', sa.String(length=16), nullable=False),
    sa.Column('model', sa.String(length=255), nullable=False),
    sa.Column('completed', sa.BigInteger(), nullable=False),
    sa.Column('failed', sa.BigInteger(), nullable=False),
    sa.Column('cancelled', sa.BigInteger(), nullable=False),
    sa.Column('timeout', sa.BigInteger(), nullable=False),
    sa.Column('prompt_tokens', sa.BigInteger(), nullable=False),
    sa.Column('completion_tokens', sa.BigInteger(), nullable=False),
    sa.Column('images', sa.BigInteger(), nullable=False),
    sa.Column('audio_s', sa.Double(), nullable=False),
    sa.Column('gpu_s', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('owner', 'day', 'type', 'model')
    )
    op.create_index('usage_days', 'usage', ['day'], unique=False)


def downgrade() -> None:
    op.drop_table('usage')
    op.drop_column('api_keys', 'quotas')
    op.drop_column('api_keys', 'weight')
    # Nobody would release them.
    op.execute("UPDATE jobs SET due_at = created_at WHERE status = 'queued' AND held_for IS NOT NULL")
    op.drop_index('held', table_name='jobs')
    op.drop_column('jobs', 'meter')
    op.drop_column('jobs', 'held_for')
