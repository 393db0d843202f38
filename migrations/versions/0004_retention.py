"""Params and results go a while after their job has ended"""

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None

_IS_WHOLE = sa.text('pruned_at IS NULL AND completed_at IS NOT NULL')


def upgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.add_column(sa.Column('pruned_at', sa.Double(), nullable=True))
        batch_op.create_index('prunable', ['completed_at'], unique=False, sqlite_where=_IS_WHOLE, postgresql_where=_IS_WHOLE)


def downgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.drop_index('prunable')
        batch_op.drop_column('pruned_at')
