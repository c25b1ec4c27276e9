"""pruners"""
