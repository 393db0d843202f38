"""Keys have owners, and operators' calls an audit log"""

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None

_IS_QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    with op.batch_alter_table('api_keys', schema=None) as batch_op:
        batch_op.add_column(sa.Column('owner', sa.String(length=64), nullable=True))
    # Until now the jobs of a key belonged to the key.
    op.execute('UPDATE api_keys SET owner = id')
    with op.batch_alter_table('api_keys', schema=None) as batch_op:
        batch_op.alter_column('owner', existing_type=sa.String(length=64), nullable=False)
    op.create_table('audit',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('at', sa.Double(), nullable=False),
    sa.Column('actor', sa.String(length=64), nullable=True),
    sa.Column('address', sa.String(length=64), nullable=True),
    sa.Column('action', sa.String(length=64), nullable=False),
    sa.Column('target', sa.String(length=512), nullable=False),
    sa.Column('result', sa.String(length=64), nullable=False),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('audit_times', 'audit', ['at'], unique=False)
    op.create_index('queued_of_owner', 'jobs', ['owner'], unique=False, sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED)


def downgrade() -> None:
    op.drop_index('queued_of_owner', table_name='jobs')
    op.drop_table('audit')
    with op.batch_alter_table('api_keys', schema=None) as batch_op:
        batch_op.drop_column('owner')
